"""Writes snapshots of a training as checkpoints, and restores a training from one on all ranks.

`checkpoint_format` describes the files, `checkpoint_selection` chooses among the checkpoints of a run.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
from pyarrow import fs
from ray.train import Checkpoint
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from giffy_ray.config import ConfigError, Experiment, from_yaml, to_yaml
from giffy_ray.core import distributed
from giffy_ray.core.storage import delete_file, filesystem_of, join, read_text
from giffy_ray.training import learners
from giffy_ray.training.checkpoint_format import (
    EXPERIMENT,
    OPTIMIZERS,
    TRAIN_STATE,
    TensorLayouts,
    TensorTarget,
    TrainState,
    contiguous_weights,
    copy_checkpoint,
    copy_tensor,
    match_tensors,
    network_file,
    open_files,
    read_layouts,
    read_manifest,
    read_train_state,
    write_manifest,
)
from giffy_ray.training.checkpoint_selection import delete_checkpoint, first_valid, latest_resumable, list_checkpoints
from giffy_ray.training.learners import Learner
from giffy_ray.training.learners.optimized_module import AVERAGE_SUFFIX

_BROADCAST_BYTES = 2**20  # small tensors are broadcast together in groups of this size
_RAY_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"


class Snapshot:
    """A copy of a learner's state in CPU memory, which can be written while the training continues."""

    def __init__(self, learner: Learner, experiment: Experiment, state: TrainState):
        self.experiment = experiment
        self.state = state
        self.networks = {name: _copy_to_cpu(contiguous_weights(net)) for name, net in learner.networks.items()}
        optimizer_states = {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
        tensors, self.optimizer_values = _split_optimizer_states(optimizer_states)
        self.optimizer_tensors = _copy_to_cpu(tensors)

    def save(self, folder: Path, before_manifest: Callable[[], None] = lambda: None) -> None:
        """Writes the checkpoint into an existing, empty local folder, its manifest last."""
        for name, weights in self.networks.items():
            save_file(weights, folder / network_file(name))
        save_file(self.optimizer_tensors, folder / OPTIMIZERS)
        (folder / EXPERIMENT).write_text(to_yaml(self.experiment))
        state = {**vars(self.state), "optimizers": self.optimizer_values}
        (folder / TRAIN_STATE).write_text(json.dumps(state, indent=1))
        write_manifest(folder, before_manifest)

    def write(
        self, filesystem: fs.FileSystem, path: str, before_manifest: Callable[[], None] = lambda: None
    ) -> Checkpoint:
        """Writes the checkpoint to a new folder, local or in a bucket, its manifest last.

        Args:
            filesystem: Where to write.
            path: Path of the folder on `filesystem`.
            before_manifest: Called when all other files are complete. If it raises, the checkpoint stays incomplete
                and is never used.
        """
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(path).mkdir(parents=True)
            self.save(Path(path), before_manifest)
        else:
            with tempfile.TemporaryDirectory(prefix="giffy_ray-checkpoint-") as folder:
                self.save(Path(folder))
                copy_checkpoint(Path(folder), filesystem, path, before_manifest)
        return Checkpoint(path, filesystem)


def _copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _split_optimizer_states(states: Mapping[str, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Splits optimizer state dicts into tensors, named optimizer/parameter/entry, and values that fit into JSON."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, state in states.items():
        parameter_values: dict[int, dict[str, Any]] = {}
        for index, entries in state["state"].items():
            parameter_values[index] = {key: value for key, value in entries.items() if not torch.is_tensor(value)}
            for key in entries.keys() - parameter_values[index].keys():
                tensors[f"{name}/{index}/{key}"] = entries[key].contiguous()
        values[name] = {"state": parameter_values, "param_groups": state["param_groups"]}
    return tensors, values


def estimate_bytes(learner: Learner) -> int:
    """Estimates the size of a checkpoint: networks, averages, and Adam's two moments per optimized parameter.

    `learner` may be on the meta device.
    """
    weights = [value for network in learner.networks.values() for value in network.state_dict().values()]
    optimized = [
        parameter
        for optimizer in learner.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return sum(map(_count_bytes, weights)) + 2 * sum(map(_count_bytes, optimized))


def _count_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def new_checkpoint_path(experiment: Experiment) -> str:
    """Returns the path or URI for the run's next checkpoint, named as Ray Train names them."""
    return join(experiment.run_dir, f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")


def copy_checkpoint_from(experiment: Experiment, source: Experiment, epoch: int) -> None:
    """Makes the checkpoint of `source` at the end of `epoch` the newest one of the experiment's run.

    Does nothing if the run has more steps already: then an interrupted caller had copied it before. The caller must
    hold the run's lock. Raises ConfigError where `source` has no valid checkpoint of that epoch.
    """
    source_states = list_checkpoints(source)
    candidates = [path for path, state in source_states.items() if state.get("epoch") == epoch]
    source_checkpoint = first_valid(source, candidates)
    steps_done = source_states[source_checkpoint]["steps_done"]
    latest = latest_resumable(experiment)
    if latest and read_train_state(latest)["steps_done"] > steps_done:
        return
    path = new_checkpoint_path(experiment)
    with open_files(source_checkpoint, None) as folder:
        copy_checkpoint(folder, *filesystem_of(path))
    for checkpoint_dir, state in list_checkpoints(experiment).items():
        if checkpoint_dir != path and state.get("steps_done") == steps_done:  # the later name would win the tie
            delete_checkpoint(checkpoint_dir)


def delete_ray_checkpoint_list(experiment: Experiment) -> None:
    """Deletes Ray Train's own list of the run's checkpoints, if there is one.

    Ray Train reads it at the start of a run and refuses the run if a listed checkpoint is missing. We select and delete
    checkpoints ourselves.
    """
    delete_file(join(experiment.run_dir, _RAY_CHECKPOINT_LIST))


def restore(checkpoint_dir: str, learner: Learner) -> TrainState:
    """Restores a learner of the same experiment from a checkpoint. Collective: every rank must call it.

    Rank 0 alone reads the files, one tensor at a time, and broadcasts each.

    Raises:
        CorruptCheckpoint: A file does not match the manifest.
        ValueError: The checkpoint belongs to a different experiment.
        Exception: Any other error while reading. Every rank raises the same error.
    """
    with contextlib.ExitStack() as stack:

        def read() -> tuple[_CheckpointTensors, dict[str, Any]]:
            tensor_files = [*(network_file(name) for name in learner.networks), OPTIMIZERS]
            all_files = dict.fromkeys([*read_manifest(checkpoint_dir), *tensor_files, TRAIN_STATE])
            folder = stack.enter_context(open_files(checkpoint_dir, list(all_files)))
            state = json.loads((folder / TRAIN_STATE).read_text())
            return _CheckpointTensors.from_files(folder, tensor_files), state

        def match() -> tuple[list[TensorTarget], dict[str, dict[str, Any]]]:
            targets = []
            for name, network in learner.networks.items():
                file = network_file(name)
                targets += match_tensors(file, tensors.layouts[file], network)
            states, optimizer_targets = _allocate_optimizer_states(
                tensors.layouts[OPTIMIZERS], optimizer_values, learner.optimizers
            )
            return [*targets, *optimizer_targets], states

        tensors, state = distributed.run_on_rank_zero(read)
        optimizer_values = state.pop("optimizers")
        targets, optimizer_states = distributed.run_on_all_ranks(match)
        tensors.copy_into(targets, _device_of(learner))
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(optimizer_states[name])
    return TrainState(**state)


def check_pretrained(checkpoint_dir: str, learner: Learner) -> None:
    """Checks by a checkpoint's config alone whether `load_pretrained` can use it. Reads no weights.

    Args:
        checkpoint_dir: Local path or URI of the checkpoint.
        learner: The learner to initialize; may be on the meta device.

    Raises:
        ConfigError: A shared network has other layers.
        CorruptCheckpoint: The manifest is missing or invalid.
    """
    read_manifest(checkpoint_dir)
    text = read_text(join(checkpoint_dir, EXPERIMENT))
    try:
        with torch.device("meta"):
            networks = learners.build(from_yaml(text or ""), torch.device("meta")).networks
    except ConfigError:
        return  # written by another version of giffy_ray; `load_pretrained` needs only the networks
    shared = [name for name in learner.networks if text and name in networks and not name.endswith(AVERAGE_SUFFIX)]
    for name in shared:
        expected = _shapes_of(learner.networks[name])
        saved = _shapes_of(networks[name])
        layer = next((key for key in (*expected, *saved) if expected.get(key) != saved.get(key)), None)
        if layer is not None:
            raise ConfigError(
                f"{checkpoint_dir} belongs to a different model: {layer} of its {name} has shape "
                f"{saved.get(layer, 'none')}, and this experiment's has {expected.get(layer, 'none')}"
            )


def _shapes_of(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def load_pretrained(checkpoint_dir: str, learner: Learner) -> None:
    """Initializes the learner's networks from a checkpoint. Collective: every rank must call it.

    Loads each network that both have, from its moving average if the checkpoint holds one. The learner's own average
    starts from the same weights. Networks that the checkpoint lacks keep their initial weights. Rank 0 alone reads the
    files, as in `restore`.

    Raises:
        CorruptCheckpoint: A file does not match the manifest.
        ConfigError: A shared network has other layers, or no network is shared.
        Exception: Any other error while reading. Every rank raises the same error.
    """
    names = [name for name, network in learner.networks.items() if not isinstance(network, AveragedModel)]
    with contextlib.ExitStack() as stack:

        def read() -> tuple[dict[str, str], _CheckpointTensors]:
            files = read_manifest(checkpoint_dir)
            sources = {}
            for name in names:
                if network_file(name) in files:
                    average = network_file(f"{name}{AVERAGE_SUFFIX}")
                    sources[name] = average if average in files else network_file(name)
            if not sources:
                raise ConfigError(f"train.init_from: {checkpoint_dir} has none of the networks {', '.join(names)}")
            folder = stack.enter_context(open_files(checkpoint_dir, list(sources.values())))
            return sources, _CheckpointTensors.from_files(folder, sources.values())

        def match() -> list[TensorTarget]:
            targets = []
            for name, file in sources.items():
                prefix = "module." if file == network_file(f"{name}{AVERAGE_SUFFIX}") else ""
                layouts = {key: layout for key, layout in tensors.layouts[file].items() if key.startswith(prefix)}
                try:
                    targets += match_tensors(file, layouts, learner.networks[name], prefix)
                except ValueError as error:
                    raise ConfigError(
                        f"train.init_from: {checkpoint_dir} belongs to a different model: {error}"
                    ) from error
            return targets

        sources, tensors = distributed.run_on_rank_zero(read)
        targets = distributed.run_on_all_ranks(match)
        tensors.copy_into(targets, _device_of(learner))
    for name in names:
        average = learner.networks.get(f"{name}{AVERAGE_SUFFIX}")
        if average is not None:
            cast(AveragedModel, average).module.load_state_dict(learner.networks[name].state_dict())


@dataclass
class _CheckpointTensors:
    """The tensors in a checkpoint's files. All ranks know their layouts; only rank 0 can read the files."""

    folder: Path  # on rank 0's machine
    layouts: Mapping[str, TensorLayouts]  # by file name

    @classmethod
    def from_files(cls, folder: Path, files: Iterable[str]) -> _CheckpointTensors:
        return cls(folder, {file: read_layouts(folder / file) for file in files})

    def copy_into(self, targets: Iterable[TensorTarget], device: torch.device) -> None:
        """Copies tensors into their targets in place, a group at a time. All ranks must pass the same targets.

        Rank 0 takes part in every broadcast even after it fails to read, or the other ranks would hang. `device` is
        the learner's.
        """
        failure = None
        for group in _group_by_size(targets):
            if distributed.rank() == 0 and failure is None:
                try:
                    for target in group:
                        copy_tensor(self.folder / target.file, target)
                except Exception as error:
                    failure = error
            distributed.broadcast_tensors([target.tensor for target in group], device)
        distributed.raise_first_error(failure)


def _group_by_size(targets: Iterable[TensorTarget]) -> Iterator[list[TensorTarget]]:
    """Groups targets, in order, into at most `_BROADCAST_BYTES` each; a larger tensor gets its own group."""
    group: list[TensorTarget] = []
    size = 0
    for target in targets:
        if group and size + target.tensor.nbytes > _BROADCAST_BYTES:
            yield group
            group = []
            size = 0
        group.append(target)
        size += target.tensor.nbytes
    if group:
        yield group


def _device_of(learner: Learner) -> torch.device:
    weights = (weight for network in learner.networks.values() for weight in network.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def _allocate_optimizer_states(
    layouts: TensorLayouts, values: Mapping[str, Any], optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[dict[str, dict[str, Any]], list[TensorTarget]]:
    """Builds state dicts for the optimizers with uninitialized tensors, and the targets that fill these tensors.

    Raises ValueError where the checkpoint belongs to a different experiment.
    """
    missing = optimizers.keys() - values.keys()
    if missing:
        raise ValueError(
            f"optimizer {min(missing)!r}: the checkpoint has no state of it; it belongs to a different experiment"
        )
    states: dict[str, dict[str, Any]] = {}
    parameters: dict[str, list[torch.Tensor]] = {}
    for name, optimizer in optimizers.items():
        saved = values[name]
        states[name] = {
            "state": {int(index): dict(entries) for index, entries in saved["state"].items()},
            "param_groups": [
                {key: _restore_tuple(key, value) for key, value in group.items()} for group in saved["param_groups"]
            ],
        }
        parameters[name] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    targets = []
    for key, (shape, dtype) in layouts.items():
        name, index, entry = key.rsplit("/", 2)
        if name in optimizers:
            tensor = _allocate_state_tensor(name, int(index), entry, shape, dtype, parameters[name])
            states[name]["state"][int(index)][entry] = tensor
            targets.append(TensorTarget(OPTIMIZERS, key, tensor))
    return states, targets


def _allocate_state_tensor(
    name: str, index: int, entry: str, shape: list[int], dtype: torch.dtype, parameters: list[torch.Tensor]
) -> torch.Tensor:
    """Allocates a tensor of a parameter's state with the parameter's device and memory format.

    Scalars are allocated on the CPU; the optimizer moves them if needed.
    """
    if not shape:
        return torch.empty((), dtype=dtype)
    expected = list(parameters[index].shape) if index < len(parameters) else None
    if shape != expected:  # load_state_dict compares the number of parameters, but not their shapes
        raise ValueError(
            f"optimizer {name!r}, parameter {index}: the checkpoint's {entry} has shape {shape}, and this experiment's "
            f"has {expected}; the checkpoint belongs to a different experiment"
        )
    return torch.empty_like(parameters[index], dtype=dtype, requires_grad=False)


def _restore_tuple(key: str, value: Any) -> Any:
    """Undoes JSON's conversion of tuples, such as betas, to lists; `params` is a list."""
    return tuple(value) if isinstance(value, list) and key != "params" else value
