"""Checkpoints of tiny networks with random weights, whose clips differ from a cross-fade."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from giffy_ray.config import Experiment, override, to_yaml
from giffy_ray.training import checkpoint_format, learners
from tests.conftest import TINY

TINY_BETWEEN = {"model.kind": "between", "model.widths": (4, 4, 6), "model.latent": 3}
TINY_CVAE = {"model.kind": "cvae", **TINY}


def write_checkpoint(folder: Path, fields: dict[str, Any], seed: int = 0) -> str:
    """Writes a checkpoint of a network whose weights are all random. Returns its path."""
    experiment = override(Experiment(), fields)
    learner = learners.build(experiment, torch.device("cpu"))
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for name, network in learner.networks.items():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        save_file(checkpoint_format.contiguous_weights(network), folder / checkpoint_format.network_file(name))
    (folder / checkpoint_format.EXPERIMENT).write_text(to_yaml(experiment))
    checkpoint_format.write_manifest(folder)
    return str(folder)
