"""Accumulates perceptual metrics over the batches of an evaluation, in the manner of torchmetrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from giffy_ray.config import PerceptualMetric, UserSuppliedMetric
from giffy_ray.core.tensor_types import Clips, PerClip
from giffy_ray.evaluation import perceptual_metrics
from giffy_ray.evaluation.evaluator import REAL

# Metrics that compare the features of all generated clips with those of all targets: kind of features, distance.
_SET_DISTANCES: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "kernel_distance_frames": ("frames", perceptual_metrics.kernel_distance_frames),
    "kernel_distance_motion": ("frames", perceptual_metrics.kernel_distance_motion),
    "fid": ("fid", perceptual_metrics.frechet_distance),
    "fvd": ("fvd", perceptual_metrics.frechet_distance),
}


class PerceptualEvaluator:
    """Computes perceptual metrics of some clips of a dataset; `update` is a `ClipCallback`.

    Args:
        names: Metrics to compute.
        weights: Paths of TorchScript files by metric.
        indices: Dataset indices of the clips to use; `update` ignores all others.

    Raises:
        ConfigError: A metric lacks its package or its weights.
    """

    def __init__(
        self, names: Iterable[PerceptualMetric], weights: Mapping[UserSuppliedMetric, str], indices: np.ndarray
    ):
        self.indices = indices
        self._names = tuple(dict.fromkeys(names))
        pair_distances: dict[str, Callable[[Clips, Clips], PerClip]] = {
            "st_lpips": perceptual_metrics.st_lpips,
            "lpips": partial(perceptual_metrics.lpips, weights=weights.get("lpips")),
        }
        extractors: dict[str, Callable[[Clips], Tensor]] = {
            "frames": perceptual_metrics.frame_features,
            "fid": partial(perceptual_metrics.inception_features, weights=weights.get("fid")),
            "fvd": partial(perceptual_metrics.i3d_features, weights=weights.get("fvd")),
        }
        self._pair_distances = {name: pair_distances[name] for name in self._names if name in pair_distances}
        kinds = dict.fromkeys(_SET_DISTANCES[name][0] for name in self._names if name in _SET_DISTANCES)
        self._extractors = {kind: extractors[kind] for kind in kinds}
        # (method, pairwise metric or kind of features) -> per-batch distances or features
        self._batches: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._target = torch.empty(0)
        perceptual_metrics.check_available(self._names, weights)

    def update(self, method: str, indices: np.ndarray, clips: np.ndarray) -> None:
        """Adds a batch of clips. The target clips of a batch must precede the generated ones."""
        selected = torch.from_numpy(clips[np.isin(indices, self.indices)])
        if not len(selected):
            return
        if method == REAL:
            self._target = selected
        else:
            for name, distance in self._pair_distances.items():
                self._batches[method, name].append(distance(selected, self._target))
        for kind, extract in self._extractors.items():
            self._batches[method, kind].append(extract(selected))

    def compute(self) -> dict[str, dict[str, float]]:
        """Returns method -> metric -> value, with the methods in the order of their first update."""
        accumulated = {key: torch.cat(batches) for key, batches in self._batches.items()}
        methods = dict.fromkeys(method for method, _ in accumulated if method != REAL)
        return {
            method: {name: self._compute_metric(name, method, accumulated) for name in self._names}
            for method in methods
        }

    def _compute_metric(self, name: str, method: str, accumulated: Mapping[tuple[str, str], Tensor]) -> float:
        if name in self._pair_distances:
            return float(accumulated[method, name].mean())
        kind, distance = _SET_DISTANCES[name]
        return distance(accumulated[method, kind], accumulated[REAL, kind])
