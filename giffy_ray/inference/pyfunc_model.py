"""How MLflow loads a registered model: `mlflow.pyfunc.load_model("models:/giffy_ray@champion")`, where giffy_ray is.

    {"start": uint8 [pairs, height, width, 3], "end": the same} -> clips, uint8 [pairs, frames, height, width, 3]

Nothing is unpickled: what is loaded is a checkpoint, weights in safetensors and the experiment in YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training import checkpoints


class InterpolationModel:
    def __init__(self, location: str):
        self.learner, self.experiment = checkpoints.load(location)

    def predict(self, pairs: Mapping[str, np.ndarray], params: Mapping[str, Any] | None = None) -> np.ndarray:
        """The prior's mean of each pair; with `params={"seed": 1}` a sample, by its place among them."""
        start, end = (torch.as_tensor(pairs[name]) for name in ("start", "end"))
        seed = (params or {}).get("seed")
        noise = torch.zeros(len(start), self.learner.latent)
        if seed is not None and self.learner.latent:
            noise = noise_from_keys(seed, range(len(start)), self.learner.latent)
        return self.learner.generate(start, end, noise).numpy()


def _load_pyfunc(location: str) -> InterpolationModel:
    """The name that MLflow calls."""
    return InterpolationModel(location)
