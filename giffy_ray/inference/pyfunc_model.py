"""MLflow pyfunc model: `mlflow.pyfunc.load_model("models:/giffy_ray@champion")` where giffy_ray is installed.

    {"start": uint8 [pairs, height, width, 3], "end": uint8 [pairs, height, width, 3]}
        -> uint8 [pairs, frames, height, width, 3]

The model is a checkpoint: weights in safetensors and the experiment in YAML. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from giffy_ray.models.sampling import noise_from_keys
from giffy_ray.training import checkpoint_format


class InterpolationModel:
    """Generates the clip between two images. MLflow calls `predict`."""

    def __init__(self, checkpoint_dir: str):
        self.learner, self.experiment = checkpoint_format.load_learner(checkpoint_dir)

    def predict(self, pairs: Mapping[str, np.ndarray], params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Generates one clip for each pair of images.

        Args:
            pairs: `start` and `end`, each uint8 [pairs, height, width, 3].
            params: With `{"seed": 1}` the clips are random samples; the noise of a pair depends on the seed and its
                index. Without a seed they are the mean of the prior.

        Returns:
            uint8 [pairs, frames, height, width, 3].
        """
        start = torch.as_tensor(pairs["start"])
        end = torch.as_tensor(pairs["end"])
        seed = (params or {}).get("seed")
        noise = torch.zeros(len(start), self.learner.latent)
        if seed is not None and self.learner.latent:
            noise = noise_from_keys(seed, range(len(start)), self.learner.latent)
        return self.learner.generate(start, end, noise).numpy()


def _load_pyfunc(path: str) -> InterpolationModel:
    """Entry point of MLflow, which looks it up by this name."""
    return InterpolationModel(path)
