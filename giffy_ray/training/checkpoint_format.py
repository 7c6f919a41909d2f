"""On-disk format of a checkpoint: verification, and loading of its weights for inference. Imports no Ray.

    <network>.safetensors     weights of one network, without a DDP prefix
    optimizers.safetensors    tensors of the optimizer states
    position.json             the TrainState, and everything in the optimizer states that is not a tensor
    experiment.yaml           every config field, so that a checkpoint is usable on its own
    manifest.json             size and sha256 of every other file; written last

A checkpoint lies in a local folder or in a bucket. One whose files do not match its manifest is never used. Nothing is
pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from giffy_ray.config import BetweenConfig, Experiment, flatten, from_yaml, override, to_yaml
from giffy_ray.core.storage import (
    download_file,
    is_file,
    join,
    local_path,
    open_stream,
    read_bytes,
    read_text,
    write_text,
)
from giffy_ray.training import learners
from giffy_ray.training.learners import Learner
from giffy_ray.training.learners.optimized_module import AVERAGE_SUFFIX

if TYPE_CHECKING:
    from pyarrow import fs

EXPERIMENT = "experiment.yaml"
MANIFEST = "manifest.json"
OPTIMIZERS = "optimizers.safetensors"
TRAIN_STATE = "position.json"
_EXPORTED_FIELDS = ("clip.", "model.", "train.seed")  # the config fields that determine the generated clips
_CHUNK_BYTES = 2**24
_CPU = torch.device("cpu")

TensorLayouts = Mapping[str, tuple[list[int], torch.dtype]]  # shape and dtype of each tensor in a file, by name


class CorruptCheckpoint(Exception):
    """The files of a checkpoint do not match its manifest. The message names the folder, the file and the problem."""


@dataclass(frozen=True)
class TrainState:
    """Progress of a training at the moment of a checkpoint."""

    steps_done: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # measured at this step
    sums: Mapping[str, float] = field(default_factory=dict)  # running sums of the losses since they were last logged
    epoch: int | None = None  # set if an epoch ended here, with these `metrics`
    skipped: int = 0  # steps skipped for non-finite gradients since the run began


def network_file(name: str) -> str:
    """Returns the file name of a network's weights."""
    return f"{name}.safetensors"


def contiguous_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the network's state dict as contiguous tensors, which safetensors requires."""
    return {key: value.contiguous() for key, value in network.state_dict().items()}


def load_learner(checkpoint_dir: str, device: torch.device = _CPU) -> tuple[Learner, Experiment]:
    """Loads a checkpoint, ready to generate.

    Only the weights are read or downloaded: the optimizer states of the paper's CVAE are twice as large.

    Args:
        checkpoint_dir: Local path or URI of the checkpoint.
        device: Device of the networks.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
        CorruptCheckpoint: A file does not match the manifest.
    """
    text = read_text(join(checkpoint_dir, EXPERIMENT))
    if text is None:
        raise FileNotFoundError(f"{checkpoint_dir}: not a checkpoint (it has no {EXPERIMENT})")
    experiment = from_yaml(text)
    learner = learners.build(experiment, device)
    with open_files(checkpoint_dir, [network_file(name) for name in learner.networks]) as folder:
        _load_networks(folder, learner)
    return learner, experiment


def _load_networks(folder: Path, learner: Learner) -> None:
    """Loads a local checkpoint's weights on this rank alone. Raises ValueError where a network's tensors differ."""
    for name, network in learner.networks.items():
        path = folder / network_file(name)
        for target in match_tensors(path.name, read_layouts(path), network):
            copy_tensor(path, target)


def export_weights(checkpoint_dir: str, folder: Path) -> None:
    """Writes the part of a checkpoint that generates clips: its weights and the config fields that shape them.

    The weights are the moving average where there is one, so the export is half or a quarter of the checkpoint's size.
    All other config fields get their defaults, because they may hold private paths or passwords. `load_learner` and
    `load_pretrained` accept the export; a training cannot resume from it.

    Raises:
        FileNotFoundError: `checkpoint_dir` holds no checkpoint.
        CorruptCheckpoint: A file does not match the manifest.
        FileExistsError: `folder` is not empty.
    """
    trained, experiment = load_learner(checkpoint_dir)
    exported = {name: value for name, value in flatten(experiment).items() if name.startswith(_EXPORTED_FIELDS)}
    if isinstance(experiment.model, BetweenConfig):
        exported["model.adversarial_weight"] = 0.0  # the discriminators are not exported
    experiment = override(Experiment(), exported)
    networks = dict(learners.build(experiment, torch.device("cpu")).networks)
    for name, network in networks.items():
        average = trained.networks.get(f"{name}{AVERAGE_SUFFIX}")
        source = trained.networks[name] if average is None else cast(AveragedModel, average).module
        network.load_state_dict(source.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; delete it or publish to another folder")
    for name, network in networks.items():
        save_file(contiguous_weights(network), folder / network_file(name))
    (folder / EXPERIMENT).write_text(to_yaml(experiment))
    write_manifest(folder)


def write_manifest(folder: Path, before_manifest: Callable[[], None] = lambda: None) -> None:
    """Completes a local checkpoint: fingerprints its files, calls `before_manifest`, then writes the manifest."""
    files = {path.name: _fingerprint(str(path)) for path in sorted(folder.iterdir())}
    before_manifest()
    write_text(str(folder / MANIFEST), json.dumps({"files": files}, indent=1))


def copy_checkpoint(
    folder: Path, filesystem: fs.FileSystem, path: str, before_manifest: Callable[[], None] = lambda: None
) -> None:
    """Copies a local checkpoint to `path` on `filesystem`, its manifest last, right after `before_manifest`."""
    from pyarrow import fs  # loading a checkpoint, for inference, does without it

    filesystem.create_dir(path)
    names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
    for name in (*names, MANIFEST):
        if name == MANIFEST:
            before_manifest()
        fs.copy_files(str(folder / name), f"{path}/{name}", fs.LocalFileSystem(), filesystem)


def read_manifest(checkpoint_dir: str) -> dict[str, dict[str, Any]]:
    """Returns `bytes` and `sha256` of each file, by file name. Raises CorruptCheckpoint."""
    try:
        text = read_text(join(checkpoint_dir, MANIFEST))
        if text is None:
            raise CorruptCheckpoint(f"{checkpoint_dir}: has no {MANIFEST}, so writing it was interrupted")
        files = json.loads(text)["files"]
        is_valid = all("/" not in name and {"bytes", "sha256"} <= entry.keys() for name, entry in files.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{checkpoint_dir}/{MANIFEST}: cannot be parsed ({error!r})") from error
    if not is_valid:
        raise CorruptCheckpoint(
            f"{checkpoint_dir}/{MANIFEST}: must list files of its own folder, each with bytes and sha256"
        )
    return files


def read_train_state(checkpoint_dir: str) -> dict[str, Any]:
    """Returns the content of position.json, or an empty dict where it is missing or does not match the manifest."""
    location = join(checkpoint_dir, TRAIN_STATE)
    try:
        expected = read_manifest(checkpoint_dir).get(TRAIN_STATE)
        if expected is None or not is_file(location):
            return {}
        content = read_bytes(location)
    except (CorruptCheckpoint, FileNotFoundError):  # a running training may just be deleting it
        return {}
    return json.loads(content) if hashlib.sha256(content).hexdigest() == expected["sha256"] else {}


def verify(checkpoint_dir: str) -> None:
    """Reads every file of a checkpoint. Raises CorruptCheckpoint where one does not match the manifest."""
    for name, expected in read_manifest(checkpoint_dir).items():
        path = join(checkpoint_dir, name)
        _check_fingerprint(path, expected, path)


@contextlib.contextmanager
def open_files(checkpoint_dir: str, names: list[str] | None) -> Iterator[Path]:
    """Yields a local folder with the named files of a checkpoint, or with all of them, each checked by its manifest.

    Files of a bucket are downloaded to a temporary folder. Raises CorruptCheckpoint.
    """
    files = read_manifest(checkpoint_dir)
    local_folder = local_path(checkpoint_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = local_folder or Path(temporary)
        for name in files if names is None else names:
            source = join(checkpoint_dir, name)
            if name not in files:
                raise CorruptCheckpoint(f"{checkpoint_dir}/{MANIFEST}: does not list {name}")
            if local_folder is None:
                _check_exists(source)
                download_file(source, folder / name)
            _check_fingerprint(str(folder / name), files[name], source)
        yield folder


def _check_fingerprint(path: str, expected: Mapping[str, Any], display_path: str) -> None:
    actual = _fingerprint(path)
    if actual["bytes"] != expected["bytes"]:
        raise CorruptCheckpoint(f"{display_path}: has {actual['bytes']} bytes, not {expected['bytes']}")
    if actual["sha256"] != expected["sha256"]:
        raise CorruptCheckpoint(f"{display_path}: its content has changed since it was written (sha256 differs)")


def _fingerprint(location: str) -> dict[str, Any]:
    _check_exists(location)
    digest = hashlib.sha256()
    size = 0
    with open_stream(location) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_exists(location: str) -> None:
    if not is_file(location):
        raise CorruptCheckpoint(f"{location}: is missing")


@dataclass(frozen=True)
class TensorTarget:
    """A tensor in memory, and the tensor of a checkpoint to copy into it."""

    file: str
    key: str
    tensor: torch.Tensor


def read_layouts(path: Path) -> TensorLayouts:
    """Returns shape and dtype of the tensors in a safetensors file."""
    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # memory-mapped, not read  # noqa: SIM118
        return {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def copy_tensor(path: Path, target: TensorTarget) -> None:
    """Copies one tensor of a file into its target.

    Opens the file anew for each tensor: pages read from a mapped file count as our memory until the file is closed.
    """
    with safe_open(path, framework="pt") as opened:
        target.tensor.copy_(opened.get_tensor(target.key))


def match_tensors(file: str, layouts: TensorLayouts, network: nn.Module, prefix: str = "") -> list[TensorTarget]:
    """Pairs the weights and buffers of a network with the tensors of `file`.

    Args:
        file: Name of the file.
        layouts: Layouts of the tensors in it.
        network: The network to load into.
        prefix: Prepended to the network's tensor names to get those in the file.

    Raises:
        ValueError: The names or shapes differ.
    """
    state = {f"{prefix}{key}": tensor for key, tensor in network.state_dict().items()}
    saved_shapes = {key: shape for key, (shape, _) in layouts.items()}
    expected_shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    keys = {**expected_shapes, **saved_shapes}
    differing = [key for key in keys if saved_shapes.get(key) != expected_shapes.get(key)]
    if differing:
        key = differing[0]
        saved = f"shape {saved_shapes[key]}" if key in saved_shapes else "no such tensor"
        expected = f"shape {expected_shapes[key]}" if key in expected_shapes else "no such tensor"
        raise ValueError(
            f"{file}: for {key!r} the checkpoint has {saved} and this experiment has {expected} "
            f"({len(differing)} tensors differ); the checkpoint belongs to a different experiment"
        )
    return [TensorTarget(file, key, tensor) for key, tensor in state.items()]
