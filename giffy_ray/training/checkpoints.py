"""What a training needs to go on, or a user to make clips: networks, optimisers, place in the stream, experiment.

<network>.safetensors     one file a network, bare (no DDP prefix)
optimizers.safetensors    their tensors; what else they hold is in position.json
position.json             steps done, what was measured then, and the numbers of the optimisers
experiment.yaml           every field, so that a checkpoint alone is enough to use it
manifest.json             bytes and sha256 of each of the others; written last

A folder whose files are not those of its manifest is never used. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pyarrow import fs
from ray.train import Checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from giffy_ray.config import BetweenConfig, ConfigError, Experiment, flatten, from_yaml, override, to_yaml
from giffy_ray.core import distributed
from giffy_ray.core.storage import filesystem_of, is_local, join, read_bytes, read_text, write_text
from giffy_ray.training import learners
from giffy_ray.training.learners import Learner
from giffy_ray.training.learners.optimized_module import AVERAGE

METRIC = "val/l2_paper"  # by which a run's best checkpoint is chosen: the smallest
_MANIFEST, _OPTIMIZERS = "manifest.json", "optimizers.safetensors"
_PUBLISHED = ("clip.", "model.", "train.seed")  # the fields of an experiment that clips are made with
_CHUNK_BYTES = 2**24
_GROUP_BYTES = 2**20  # of the tensors that are broadcast together
_RAY_TRAINS_LIST = "checkpoint_manager_snapshot.json"
_log = logging.getLogger(__name__)

T = TypeVar("T")
Layouts = Mapping[str, tuple[list[int], torch.dtype]]  # shape and dtype of the tensors of a file, by their names
Positions = Mapping[str, Mapping[str, Any]]  # of checkpoints, by where they lie; empty where it cannot be told


class DamagedCheckpoint(Exception):
    """A checkpoint that is not as it was written; the message names its folder, the file and what is wrong."""


@dataclass(frozen=True)
class TrainState:
    """Where a training is."""

    steps_done: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # measured at this moment
    sums: Mapping[str, float] = field(default_factory=dict)  # of losses, since they were last logged
    epoch: int | None = None  # that ended here, with `metrics`
    skipped: int = 0  # steps without a finite gradient, since the run began


class Snapshot:
    """A learner at one moment, in memory of its own: it can be written while the training goes on."""

    def __init__(self, learner: Learner, experiment: Experiment, position: TrainState):
        self.experiment, self.position = experiment, position
        self.networks = {name: _kept(_weights(network)) for name, network in learner.networks.items()}
        tensors, self.numbers = _taken_apart({name: one.state_dict() for name, one in learner.optimizers.items()})
        self.tensors = _kept(tensors)

    def save(self, folder: Path, before_manifest: Callable[[], None] = lambda: None) -> None:
        """Writes it into a local folder, its manifest last."""
        for name, weights in self.networks.items():
            save_file(weights, folder / f"{name}.safetensors")
        save_file(self.tensors, folder / _OPTIMIZERS)
        (folder / "experiment.yaml").write_text(to_yaml(self.experiment))
        (folder / "position.json").write_text(json.dumps({**vars(self.position), "optimizers": self.numbers}, indent=1))
        _seal(folder, before_manifest)

    def write(
        self, filesystem: fs.FileSystem, place: str, before_manifest: Callable[[], None] = lambda: None
    ) -> Checkpoint:
        """The same wherever `place` is: to a bucket its files are copied, the manifest last.

        `before_manifest` is called when all else is there: what it raises leaves an unfinished checkpoint.
        """
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(place).mkdir(parents=True)
            self.save(Path(place), before_manifest)
            return Checkpoint(place, filesystem)
        with tempfile.TemporaryDirectory(prefix="giffy_ray-checkpoint-") as folder:
            self.save(Path(folder))
            return copied(Path(folder), filesystem, place, before_manifest)


def estimate_bytes(learner: Learner) -> int:
    """The size of a checkpoint: networks, averages, and two moments of each parameter that is optimised (Adam).

    `learner` may be on the meta device, which holds no values.
    """
    weights = [value for network in learner.networks.values() for value in network.state_dict().values()]
    moments = [
        parameter
        for optimizer in learner.optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return sum(map(_bytes_of, weights)) + 2 * sum(map(_bytes_of, moments))


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def free_bytes(experiment: Experiment) -> float:
    """What the run's checkpoints may take on the disk of a local storage; infinite for a bucket."""
    if not is_local(experiment.storage):
        return math.inf
    filesystem, folder = filesystem_of(join(experiment.storage, experiment.name))
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    own = sum(info.size or 0 for info in infos if "/checkpoint_" in info.path)
    disk = Path(folder)
    while not disk.exists():
        disk = disk.parent
    return shutil.disk_usage(disk).free + own


def export_weights(location: str, folder: Path) -> None:
    """Writes what makes the clips of a checkpoint, half or a quarter of its size: the weights, which are their average
    where there is one, and of the experiment the fields that make clips. All others are the defaults: they are nobody
    else's business, and may hold passwords.

    `load` and `start_from` take the folder; a training cannot be resumed from it. Raises FileNotFoundError,
    DamagedCheckpoint; FileExistsError for a folder that is not empty.
    """
    trained, experiment = load(location)
    made_with = {name: value for name, value in flatten(experiment).items() if name.startswith(_PUBLISHED)}
    if isinstance(experiment.model, BetweenConfig):
        made_with["model.adversarial_weight"] = 0.0  # its discriminators stay behind
    experiment = override(Experiment(), made_with)
    networks = dict(learners.build(experiment, torch.device("cpu")).networks)
    for name, network in networks.items():
        average = trained.networks.get(f"{name}{AVERAGE}")
        source = trained.networks[name] if average is None else cast(AveragedModel, average).module
        network.load_state_dict(source.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; remove it, or publish elsewhere")
    for name, network in networks.items():
        save_file(_weights(network), folder / f"{name}.safetensors")
    (folder / "experiment.yaml").write_text(to_yaml(experiment))
    _seal(folder)


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in network.state_dict().items()}


def _kept(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the memory of the CPU, which the next step does not change."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _seal(folder: Path, before_manifest: Callable[[], None] = lambda: None) -> None:
    files = {path.name: _fingerprint(str(path)) for path in sorted(folder.iterdir())}
    before_manifest()
    write_text(str(folder / _MANIFEST), json.dumps({"files": files}, indent=1))


def copied(
    folder: Path, filesystem: fs.FileSystem, place: str, before_manifest: Callable[[], None] = lambda: None
) -> Checkpoint:
    filesystem.create_dir(place)
    names = sorted(path.name for path in folder.iterdir() if path.name != _MANIFEST)
    for name in (*names, _MANIFEST):
        if name == _MANIFEST:
            before_manifest()
        fs.copy_files(str(folder / name), f"{place}/{name}", fs.LocalFileSystem(), filesystem)
    return Checkpoint(place, filesystem)


def restore(location: str, learner: Learner) -> TrainState:
    """Puts a checkpoint's state into a learner of the same experiment, on all workers: each has to call this.

    Rank 0 alone reads the files, one tensor at a time, and broadcasts it. Raises the same error on every worker:
    DamagedCheckpoint, ValueError.
    """
    with contextlib.ExitStack() as stack:

        def read() -> tuple[_Tensors, dict[str, Any]]:
            names = [*(f"{name}.safetensors" for name in learner.networks), _OPTIMIZERS]
            every = dict.fromkeys([*manifest(location), *names, "position.json"])
            folder = stack.enter_context(_fetched(location, list(every)))
            return _Tensors.of(folder, names), json.loads((folder / "position.json").read_text())

        def match() -> tuple[list[_Target], dict[str, dict[str, Any]]]:
            targets = []
            for name, network in learner.networks.items():
                targets += _matched(f"{name}.safetensors", tensors.layouts[f"{name}.safetensors"], network)
            states, of_optimizers = _allocated(tensors.layouts[_OPTIMIZERS], numbers, learner.optimizers)
            return [*targets, *of_optimizers], states

        tensors, position = distributed.on_first(read)
        numbers = position.pop("optimizers")
        targets, states = distributed.on_each(match)
        tensors.copy_into(targets, _device_of(learner))
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(states[name])
    return TrainState(**position)


def resolve_init_from(experiment: Experiment) -> str | None:
    """Where the checkpoint of `train.init_from` lies: a location, or the newest of a run.

    Trials of a search, whose storage is the search's folder, take runs from beside the search too. Raises ConfigError
    where a run of that name has no checkpoint.
    """
    start = experiment.train.init_from
    if start is None or "/" in start:
        return start
    run = override(experiment, {"name": start})
    parent = experiment.storage.rstrip("/").rpartition("/")[0]
    if parent.partition("://")[2 if "://" in experiment.storage else 0] and not _positions(run):
        beside = override(run, {"storage": parent})
        run = beside if _positions(beside) else run
    return latest_checkpoint(run)


def check_start(location: str, learner: Learner) -> None:
    """Raises what `start_from` would raise, as far as the experiment of the checkpoint tells; no weights are read.

    `learner` may be on the meta device. Raises ConfigError, DamagedCheckpoint.
    """
    manifest(location)
    text = read_text(join(location, "experiment.yaml"))
    try:
        with torch.device("meta"):
            networks = learners.build(from_yaml(text or ""), torch.device("meta")).networks
    except ConfigError:
        return  # of another version of us; `start_from` needs only the networks
    shared = [name for name in learner.networks if text and name in networks and not name.endswith(AVERAGE)]
    for name in shared:
        ours, theirs = _shapes(learner.networks[name]), _shapes(networks[name])
        layer = next((key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key)), None)
        if layer is not None:
            sizes = " and ".join(str(shapes.get(layer, "not there")) for shapes in (theirs, ours))
            raise ConfigError(f"{location} is of another model: {layer} of its {name} and of ours is {sizes}")


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def load_pretrained(location: str, learner: Learner) -> None:
    """Takes those networks of a checkpoint that the learner has too; what it has besides keeps its first weights.

    Of a network with an average of its weights, which makes the clips, it takes the average. The learner's own average
    starts from the same weights.

    Every worker has to call this; rank 0 alone reads the files, as in `restore`. Raises the same error on every worker:
    FileNotFoundError, DamagedCheckpoint, ConfigError where a network has other layers, or none is shared.
    """
    names = [name for name, network in learner.networks.items() if not isinstance(network, AveragedModel)]
    with contextlib.ExitStack() as stack:

        def read() -> tuple[dict[str, str], _Tensors]:
            files = manifest(location)
            shared = [name for name in names if f"{name}.safetensors" in files]
            if not shared:
                raise ConfigError(f"train.init_from: {location} has none of the networks {', '.join(names)}")
            candidates = {name: (f"{name}{AVERAGE}.safetensors", f"{name}.safetensors") for name in shared}
            sources = {name: next(file for file in either if file in files) for name, either in candidates.items()}
            folder = stack.enter_context(_fetched(location, list(sources.values())))
            return sources, _Tensors.of(folder, sources.values())

        def match() -> list[_Target]:
            targets = []
            for name, file in sources.items():
                prefix = "module." if file.endswith(f"{AVERAGE}.safetensors") else ""
                layouts = {key: layout for key, layout in tensors.layouts[file].items() if key.startswith(prefix)}
                try:
                    targets += _matched(file, layouts, learner.networks[name], prefix)
                except ValueError as error:
                    raise ConfigError(f"train.init_from: {location} is of another model: {error}") from error
            return targets

        sources, tensors = distributed.on_first(read)
        tensors.copy_into(distributed.on_each(match), _device_of(learner))
    for name in names:
        average = learner.networks.get(f"{name}{AVERAGE}")
        if average is not None:
            cast(AveragedModel, average).module.load_state_dict(learner.networks[name].state_dict())


def load_networks(folder: Path, learner: Learner) -> None:
    """Loads the weights of a local checkpoint into the learner's networks, on this worker alone. Raises ValueError."""
    for name, network in learner.networks.items():
        path = folder / f"{name}.safetensors"
        for target in _matched(path.name, _layouts_in(path), network):
            _copy_tensor(path, target)


@dataclass(frozen=True)
class _Target:
    """Where a tensor of a checkpoint goes."""

    file: str
    key: str
    tensor: torch.Tensor


@dataclass
class _Tensors:
    """The tensors of a checkpoint's files, which rank 0 alone can read."""

    folder: Path  # on rank 0's machine
    layouts: Mapping[str, Layouts]  # by the name of the file

    @classmethod
    def of(cls, folder: Path, files: Iterable[str]) -> _Tensors:
        return cls(folder, {file: _layouts_in(folder / file) for file in files})

    def copy_into(self, targets: Iterable[_Target], device: torch.device) -> None:
        """Copies the tensors into their targets, in place and a few at a time, on all workers, which must have the same
        targets. `device`: that of the learner.

        Rank 0 takes part in the broadcasts to the end also where it fails to read, or the others would wait for ever.
        """
        failure = None
        for group in _grouped(targets):
            if distributed.rank() == 0 and failure is None:
                try:
                    for target in group:
                        _copy_tensor(self.folder / target.file, target)
                except Exception as error:
                    failure = error
            distributed.broadcast([target.tensor for target in group], device)
        distributed.raise_first(failure)


def _grouped(targets: Iterable[_Target]) -> Iterator[list[_Target]]:
    """In order, in groups of at most `_GROUP_BYTES`; a larger tensor is alone. Many are scalars."""
    group: list[_Target] = []
    size = 0
    for target in targets:
        if group and size + target.tensor.nbytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(target)
        size += target.tensor.nbytes
    if group:
        yield group


def _layouts_in(path: Path) -> Layouts:
    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # mapped and not read yet  # noqa: SIM118
        return {key: (list(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def _copy_tensor(path: Path, target: _Target) -> None:
    """Opens the file anew for each tensor: what was read of a mapped file counts as our memory until it is closed."""
    with safe_open(path, framework="pt") as opened:
        target.tensor.copy_(opened.get_tensor(target.key))


def _matched(file: str, layouts: Layouts, network: nn.Module, prefix: str = "") -> list[_Target]:
    """The network's weights and buffers, with their names in the file. Raises ValueError where they do not match."""
    state = {f"{prefix}{key}": tensor for key, tensor in network.state_dict().items()}
    there = {key: shape for key, (shape, _) in layouts.items()}
    here = {key: list(tensor.shape) for key, tensor in state.items()}
    differing = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    if differing:
        key = differing[0]
        shapes = [f"shape {shapes[key]}" if key in shapes else "none" for shapes in (there, here)]
        raise ValueError(
            f"{file}: of {key!r} the checkpoint has {shapes[0]} and this experiment has {shapes[1]} ({len(differing)} "
            "tensors differ); it is of another experiment"
        )
    return [_Target(file, key, tensor) for key, tensor in state.items()]


def _device_of(learner: Learner) -> torch.device:
    weights = (weight for network in learner.networks.values() for weight in network.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def load(location: str) -> tuple[Learner, Experiment]:
    """The learner and the experiment of a checkpoint, local or not, on the CPU and ready to generate.

    Only what that needs is fetched: the optimisers of Table 1 are twice as large as its weights. Raises
    FileNotFoundError, DamagedCheckpoint.
    """
    text = read_text(join(location, "experiment.yaml"))
    if text is None:
        raise FileNotFoundError(f"{location}: not a checkpoint (it has no experiment.yaml)")
    experiment = from_yaml(text)
    learner = learners.build(experiment, torch.device("cpu"))
    with _fetched(location, [f"{name}.safetensors" for name in learner.networks]) as folder:
        load_networks(folder, learner)
    return learner, experiment


def verify(location: str) -> None:
    """Reads every file of a checkpoint. Raises DamagedCheckpoint where one is not as its manifest says."""
    for name, wanted in manifest(location).items():
        _compare(join(location, name), wanted)


def latest_checkpoint(experiment: Experiment) -> str:
    """Where the whole checkpoint with most steps of the run of the experiment's name lies. Raises ConfigError.

    Damaged ones are told of and passed over.
    """
    return _first_valid(experiment, list(_positions(experiment)))


def latest_resumable(experiment: Experiment) -> str | None:
    """The newest whole checkpoint, or none where the run has not finished any. Raises ConfigError if all are damaged.

    To be called by the holder of the run's lease, where nobody writes a checkpoint: those whose writing was cut off are
    removed, and damaged ones that a whole one is used in place of. So none is left that has more steps.
    """
    finished = []
    for location in _positions(experiment):
        if read_text(join(location, _MANIFEST)) is None:
            _log.warning("%s: its writing was cut off; it is removed", location)
            _remove(location)
        else:
            finished.append(location)
    if not finished:
        return None
    chosen = _first_valid(experiment, finished)
    for location in finished[: finished.index(chosen)]:
        _log.warning("%s: it is damaged, and removed: the run goes on from %s", location, chosen)
        _remove(location)
    return chosen


def best(experiment: Experiment, metric: str, smaller: bool = True) -> str:
    """Where the whole checkpoint lies that had the best `metric` when it was written. Raises ConfigError.

    Of equal ones the newest; one whose metric is NaN only where all are.
    """
    metrics = {location: position.get("metrics", {}) for location, position in _positions(experiment).items()}
    measured = {location: named[metric] for location, named in metrics.items() if metric in named}
    known = {name for named in metrics.values() for name in named}
    if known and not measured:
        raise ConfigError(f"{metric!r} was not measured at any; there are: {', '.join(sorted(known))}")
    return _first_valid(experiment, _ranked(measured, smaller))


def select(experiment: Experiment) -> str:
    """Where the checkpoint lies that stands for a run: the whole one with the best validation, or the newest where
    none was validated. It is the one that is evaluated, published and registered. Raises ConfigError."""
    positions = _positions(experiment)
    metrics = {location: position.get("metrics", {}) for location, position in positions.items()}
    validated = {location: measured[METRIC] for location, measured in metrics.items() if METRIC in measured}
    others = [location for location in positions if location not in validated]
    return _first_valid(experiment, [*_ranked(validated), *others])


def read_chosen(choose: Callable[[], str], read: Callable[[str], T]) -> tuple[str, T]:
    """What `choose` returns, such as `select`, and what `read` makes of it.

    A training that goes on may remove the checkpoint in between; then another one is chosen.
    """
    while True:
        location = choose()
        try:
            return location, read(location)
        except (FileNotFoundError, DamagedCheckpoint):
            if read_text(join(location, _MANIFEST)) is not None:  # the first file that is removed
                raise


def describe(location: str) -> str:
    """A checkpoint in words: what it was chosen by, and where it lies."""
    position = position_of(location)
    if METRIC not in position.get("metrics", {}):
        return location
    return f"{location} (epoch {position.get('epoch')}, {METRIC} {position['metrics'][METRIC]:.2f})"


def _ranked(measured: Mapping[str, float], smaller: bool = True) -> list[str]:
    """Locations by what was measured there, best first."""
    return sorted(measured, key=lambda place: _rank(measured[place], smaller))


def _rank(value: float, smaller: bool = True) -> tuple[bool, float]:
    """Sorts the best value first and NaN, which compares with nothing, last."""
    return math.isnan(value), value if smaller else -value


def last_metrics(experiment: Experiment) -> dict[str, Any] | None:
    """What was measured at the newest whole checkpoint, with its `epoch`; None where there is none, or nothing was.

    To be called by the holder of the run's lease, as `latest_resumable`.
    """
    location = latest_resumable(experiment)
    position = position_of(location) if location else {}
    if position.get("epoch") is None:
        return None
    return {"steps_done": position["steps_done"], "epoch": position["epoch"], **position["metrics"]}


def remove_superseded(experiment: Experiment) -> None:
    """All checkpoints of the run but the newest two and the `train.keep_checkpoints` best validations.

    To be called by whoever writes the run's checkpoints, after each. A storage that fails is told of: the next call
    tries again.
    """

    def kept(positions: Positions) -> list[str]:
        scores = {place: position["metrics"].get(METRIC, math.nan) for place, position in positions.items()}
        validated = _ranked({place: score for place, score in scores.items() if not math.isnan(score)})
        return [*list(positions)[:2], *validated[: experiment.train.keep_checkpoints]]

    _remove_all_but(experiment, kept)


def remove_older(experiment: Experiment, epochs: int = 0) -> None:
    """All finished checkpoints of the run but the newest, and the newest of so many epochs. As `remove_superseded`."""

    def kept(positions: Positions) -> list[str]:
        ended = [place for place, position in positions.items() if position.get("epoch") is not None]
        return [*list(positions)[:1], *ended[:epochs]]

    _remove_all_but(experiment, kept)


def _remove_all_but(experiment: Experiment, choose: Callable[[Positions], list[str]]) -> None:
    """`choose` gets the finished checkpoints and returns those that are to stay.

    What is not finished is left alone, as it may be being written.
    """
    try:
        finished = {location: position for location, position in _positions(experiment).items() if position}
        for location in finished.keys() - choose(finished):
            _remove(location)
    except OSError as failure:
        folder = join(experiment.storage, experiment.name)
        _log.warning("%s: older checkpoints could not be removed (%r)", folder, failure)


def _remove(location: str) -> None:
    """The manifest first: a removal that is cut off leaves an unfinished checkpoint, and not a damaged one."""
    filesystem, place = filesystem_of(location)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{place}/{_MANIFEST}")
    filesystem.delete_dir(place)


def copy_checkpoint_from(experiment: Experiment, other: Experiment, epoch: int) -> None:
    """Makes what `other` was at the end of `epoch` the newest checkpoint of the experiment's run.

    Unless that is past it: then this was done before. Raises ConfigError where there is no such checkpoint. To be
    called by the holder of the run's lease.
    """
    found = _positions(other)
    source = _first_valid(other, [location for location, position in found.items() if position.get("epoch") == epoch])
    own, steps_done = latest_resumable(experiment), found[source]["steps_done"]
    if own and position_of(own)["steps_done"] > steps_done:
        return
    place = place_of_new(experiment)
    with _fetched(source, None) as folder:
        copied(folder, *filesystem_of(place))
    for location, position in _positions(experiment).items():
        if location != place and position.get("steps_done") == steps_done:  # its name may be the later one
            _remove(location)


def forget_reported(experiment: Experiment) -> None:
    """Removes Ray Train's own list of checkpoints, which it reads at the start of a run and takes to be complete.

    We choose and remove checkpoints ourselves; Ray Train refuses a run of which one is missing.
    """
    filesystem, place = filesystem_of(join(experiment.storage, experiment.name, _RAY_TRAINS_LIST))
    if filesystem.get_file_info(place).type == fs.FileType.File:
        filesystem.delete_file(place)


def place_of_new(experiment: Experiment) -> str:
    """Where the run's next checkpoint goes: as Ray Train names them."""
    return join(experiment.storage, experiment.name, f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}")


def manifest(location: str) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 by the name of the file. Raises DamagedCheckpoint."""
    try:
        text = read_text(join(location, _MANIFEST))
        if text is None:
            raise DamagedCheckpoint(f"{location}: it has no {_MANIFEST}, so its writing was cut off")
        files = json.loads(text)["files"]
        sound = all("/" not in name and {"bytes", "sha256"} <= wanted.keys() for name, wanted in files.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{location}/{_MANIFEST}: cannot be read ({error!r})") from error
    if not sound:
        raise DamagedCheckpoint(f"{location}/{_MANIFEST}: it must name files of this folder, with bytes and sha256")
    return files


def position_of(location: str) -> dict[str, Any]:
    """What a checkpoint's position.json says; empty where that is missing, or not the one that its manifest names."""
    filesystem, place = filesystem_of(join(location, "position.json"))
    try:
        wanted = manifest(location).get("position.json")
        if wanted is None or filesystem.get_file_info(place).type != fs.FileType.File:
            return {}
        content = read_bytes(join(location, "position.json"))
    except (DamagedCheckpoint, FileNotFoundError):  # or it is being removed
        return {}
    return json.loads(content) if hashlib.sha256(content).hexdigest() == wanted["sha256"] else {}


def _positions(experiment: Experiment) -> Positions:
    """The checkpoint folders of a run with their positions, newest first: most steps, and of as many the later name.

    Names are moments of some machine's clock, which may have been set back since. Those whose steps are not known come
    first: they are unfinished or damaged, and whoever looks for a whole one has to tell of them.
    """
    folder = join(experiment.storage, experiment.name)
    filesystem, base = filesystem_of(folder)
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    names = [info.base_name for info in infos if info.type == fs.FileType.Directory]
    found = [join(folder, name) for name in sorted(names, reverse=True) if name.startswith("checkpoint_")]
    positions = {location: position_of(location) for location in found}
    return dict(sorted(positions.items(), key=lambda item: -item[1].get("steps_done", math.inf)))


def _first_valid(experiment: Experiment, locations: list[str]) -> str:
    damages = []
    for location in locations:
        try:
            verify(location)
        except (DamagedCheckpoint, FileNotFoundError) as damage:  # which a training that goes on may have removed
            _log.warning("%s; it is not used", damage)
            damages.append(str(damage))
        else:
            return location
    folder = join(experiment.storage, experiment.name)
    raise ConfigError("\n  ".join([f"name: no whole checkpoint in {folder} (value {experiment.name!r})", *damages]))


@contextlib.contextmanager
def _fetched(location: str, names: list[str] | None) -> Iterator[Path]:
    """A local folder with these files of a checkpoint, or all, each compared with its manifest."""
    files = manifest(location)
    filesystem, place = filesystem_of(location)
    with tempfile.TemporaryDirectory() as temporary:
        local = isinstance(filesystem, fs.LocalFileSystem)
        folder = Path(place if local else temporary)
        for name in files if names is None else names:
            if name not in files:
                raise DamagedCheckpoint(f"{location}/{_MANIFEST}: it does not name {name}")
            if not local:
                _refuse_missing(filesystem, f"{place}/{name}", join(location, name))
                fs.copy_files(f"{place}/{name}", str(folder / name), filesystem, fs.LocalFileSystem())
            _compare(str(folder / name), files[name], join(location, name))
        yield folder


def _compare(path: str, wanted: Mapping[str, Any], known_as: str | None = None) -> None:
    found = _fingerprint(path)
    if found["bytes"] != wanted["bytes"]:
        raise DamagedCheckpoint(f"{known_as or path}: has {found['bytes']} bytes, not {wanted['bytes']}")
    if found["sha256"] != wanted["sha256"]:
        raise DamagedCheckpoint(f"{known_as or path}: its content is not what was written (sha256 differs)")


def _fingerprint(location: str) -> dict[str, Any]:
    filesystem, path = filesystem_of(location)
    _refuse_missing(filesystem, path, location)
    digest, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _refuse_missing(filesystem: fs.FileSystem, path: str, known_as: str) -> None:
    if filesystem.get_file_info(path).type != fs.FileType.File:
        raise DamagedCheckpoint(f"{known_as}: is missing")


def _taken_apart(states: Mapping[str, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dicts of optimisers -> their tensors, as 'optimizer/parameter/name', and everything else, for JSON."""
    tensors, numbers = {}, {}
    for name, state in states.items():
        plain: dict[int, dict[str, Any]] = {}
        for index, of_parameter in state["state"].items():
            plain[index] = {key: value for key, value in of_parameter.items() if not torch.is_tensor(value)}
            for key in of_parameter.keys() - plain[index].keys():
                tensors[f"{name}/{index}/{key}"] = of_parameter[key].contiguous()
        numbers[name] = {"state": plain, "param_groups": state["param_groups"]}
    return tensors, numbers


def _allocated(
    layouts: Layouts, numbers: Mapping[str, Any], optimizers: Mapping[str, torch.optim.Optimizer]
) -> tuple[dict[str, dict[str, Any]], list[_Target]]:
    """State dicts for the optimisers, and their tensors, which nothing has been written into yet. Raises ValueError."""
    missing = optimizers.keys() - numbers.keys()
    if missing:
        raise ValueError(f"optimizer {min(missing)!r}: the checkpoint has none of it; it is of another experiment")
    states: dict[str, dict[str, Any]] = {}
    for name in optimizers:
        plain = numbers[name]
        groups = [{key: _as_it_was(key, value) for key, value in group.items()} for group in plain["param_groups"]]
        states[name] = {"state": {int(index): dict(of) for index, of in plain["state"].items()}, "param_groups": groups}
    parameters = {
        name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for name, optimizer in optimizers.items()
    }
    targets = []
    for key, (shape, dtype) in layouts.items():
        name, index, entry = key.rsplit("/", 2)
        if name in optimizers:
            tensor = _empty_state(name, int(index), entry, shape, dtype, parameters[name])
            states[name]["state"][int(index)][entry] = tensor
            targets.append(_Target(_OPTIMIZERS, key, tensor))
    return states, targets


def _empty_state(
    name: str, index: int, entry: str, shape: list[int], dtype: torch.dtype, parameters: list[torch.Tensor]
) -> torch.Tensor:
    """A tensor for a parameter's state, which lies in memory as the parameter does; of a scalar on the CPU, from where
    the optimiser moves it if need be."""
    if not shape:
        return torch.empty((), dtype=dtype)
    here = list(parameters[index].shape) if index < len(parameters) else None
    if shape != here:  # torch compares the number of parameters, and not their shapes
        raise ValueError(
            f"optimizer {name!r}, parameter {index}: the checkpoint has {entry} of shape {shape} where this experiment "
            f"has {here}; it is of another experiment"
        )
    return torch.empty_like(parameters[index], dtype=dtype, requires_grad=False)


def _as_it_was(key: str, value: Any) -> Any:
    """JSON knows no tuples, which betas are; params is a list."""
    return tuple(value) if isinstance(value, list) and key != "params" else value
