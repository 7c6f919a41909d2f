"""How made clips look to trained networks: gathered while an evaluation goes by, told at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from giffy_ray.config import PerceptualMetric, Supplied
from giffy_ray.core.tensor_types import Clips, PerClip
from giffy_ray.evaluation import perceptual_metrics
from giffy_ray.evaluation.evaluator import REAL

# What each compares: features of all real with those of all made clips.
_OF_SETS: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "kernel_distance_frames": ("frames", perceptual_metrics.kernel_distance_frames),
    "kernel_distance_motion": ("frames", perceptual_metrics.kernel_distance_motion),
    "fid": ("fid", perceptual_metrics.frechet_distance),
    "fvd": ("fvd", perceptual_metrics.frechet_distance),
}


class PerceptualEvaluator:
    """Perceptual metrics of the clips of some rows of a store.

    `weights`: the paths of TorchScript files. What a metric lacks is a ConfigError here.
    """

    def __init__(self, names: Iterable[PerceptualMetric], weights: Mapping[Supplied, str], rows: np.ndarray):
        self.rows = rows
        self._names = tuple(dict.fromkeys(names))
        of_pairs: dict[str, Callable[[Clips, Clips], PerClip]] = {
            "st_lpips": perceptual_metrics.st_lpips,
            "lpips": partial(perceptual_metrics.lpips, weights=weights.get("lpips")),
        }
        features: dict[str, Callable[[Clips], Tensor]] = {
            "frames": perceptual_metrics.frame_features,
            "fid": partial(perceptual_metrics.inception_features, weights=weights.get("fid")),
            "fvd": partial(perceptual_metrics.i3d_features, weights=weights.get("fvd")),
        }
        self._of_pairs = {name: of_pairs[name] for name in self._names if name in of_pairs}
        kinds = dict.fromkeys(_OF_SETS[name][0] for name in self._names if name in _OF_SETS)
        self._features = {kind: features[kind] for kind in kinds}
        self._gathered: dict[tuple[str, str], list[Tensor]] = defaultdict(list)  # of a method by metric, or features
        self._real = torch.empty(0)
        perceptual_metrics.require(self._names, weights)

    def update(self, method: str, rows: np.ndarray, clips: np.ndarray) -> None:
        """For `evaluate`: of each part the real clips come first."""
        ours = torch.from_numpy(clips[np.isin(rows, self.rows)])
        if not len(ours):
            return
        if method == REAL:
            self._real = ours
        else:
            for name, distance in self._of_pairs.items():
                self._gathered[method, name].append(distance(ours, self._real))
        for kind, features in self._features.items():
            self._gathered[method, kind].append(features(ours))

    def compute(self) -> dict[str, dict[str, float]]:
        """Each metric by method, in the order seen."""
        gathered = {key: torch.cat(parts) for key, parts in self._gathered.items()}
        methods = dict.fromkeys(method for method, _ in gathered if method != REAL)
        return {method: {name: self._value(name, method, gathered) for name in self._names} for method in methods}

    def _value(self, name: str, method: str, gathered: Mapping[tuple[str, str], Tensor]) -> float:
        if name in self._of_pairs:
            return float(gathered[method, name].mean())
        kind, distance = _OF_SETS[name]
        return distance(gathered[method, kind], gathered[REAL, kind])
