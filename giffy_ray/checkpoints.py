"""What a training needs to go on, or a user to make clips: networks, optimisers, place in the stream, experiment.

<network>.safetensors     one file a network, bare (no DDP prefix)
optimizers.pt             tensors and numbers only; read with weights_only
position.json             steps done and the metrics of that moment
experiment.yaml           every field, so that a checkpoint alone is enough to use it
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pyarrow import fs
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file

from giffy_ray import learners
from giffy_ray.config import ConfigError, Experiment, from_yaml, to_yaml
from giffy_ray.learners import Learner
from giffy_ray.storage import filesystem_of, join, read_text


@contextmanager
def written(
    learner: Learner, experiment: Experiment, steps_done: int, metrics: Mapping[str, float], rank: int
) -> Iterator[Checkpoint | None]:
    """A checkpoint in a temporary folder, to be handed to `ray.train.report`; none on ranks other than 0."""
    if rank != 0:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), learner, experiment, steps_done, metrics)
        yield Checkpoint.from_directory(folder)


def save(folder: Path, learner: Learner, experiment: Experiment, steps_done: int, metrics: Mapping[str, float]) -> None:
    for name, network in learner.networks.items():
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")
    states = {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
    torch.save(states, folder / "optimizers.pt")
    (folder / "experiment.yaml").write_text(to_yaml(experiment))
    position = {"steps_done": steps_done, "metrics": dict(metrics)}
    (folder / "position.json").write_text(json.dumps(position, indent=2))


def restore(folder: Path, learner: Learner) -> int:
    """Puts a checkpoint's state into a learner of the same experiment; returns how many steps were done."""
    load_networks(folder, learner)
    states = torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(states[name])
    return json.loads((folder / "position.json").read_text())["steps_done"]


def load_networks(folder: Path, learner: Learner) -> None:
    for name, network in learner.networks.items():
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))


def newest(experiment: Experiment) -> str:
    """Where the newest checkpoint of the run of the experiment's name lies. Raises ConfigError where there is none."""
    filesystem, base = filesystem_of(join(experiment.storage, experiment.name))
    below = fs.FileSelector(base, allow_not_found=True)
    # Ray Train names them after the moment, so that the last by name is the newest.
    folders = (info for info in filesystem.get_file_info(below) if info.type == fs.FileType.Directory)
    names = sorted(info.base_name for info in folders if info.base_name.startswith("checkpoint_"))
    if not names:
        raise ConfigError(
            f"name: no checkpoint in {join(experiment.storage, experiment.name)} (value {experiment.name!r})"
        )
    return join(experiment.storage, experiment.name, names[-1])


def load(location: str) -> tuple[Learner, Experiment]:
    """The learner and the experiment of a checkpoint, local or not, on the CPU and ready to generate.

    Only what that needs is fetched: the optimisers of Table 1 are twice as large as its weights.
    """
    text = read_text(join(location, "experiment.yaml"))
    if text is None:
        raise FileNotFoundError(f"{location}: not a checkpoint (it has no experiment.yaml)")
    experiment = from_yaml(text)
    learner = learners.build(experiment, torch.device("cpu"))
    filesystem, path = filesystem_of(location)
    with tempfile.TemporaryDirectory() as folder:
        for name in learner.networks:
            file = f"{name}.safetensors"
            fs.copy_files(f"{path}/{file}", f"{folder}/{file}", filesystem, fs.LocalFileSystem())
        load_networks(Path(folder), learner)
    return learner, experiment
