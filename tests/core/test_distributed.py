"""What workers share of a checkpoint: the files are read once, and all have the same state or the same error."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from giffy_ray.cluster.local import free_port
from giffy_ray.config import Experiment, from_yaml, override, to_yaml
from giffy_ray.core import distributed, storage
from giffy_ray.core.storage import filesystem_of
from giffy_ray.training import checkpoints, learners, train_loop
from giffy_ray.training.checkpoints import TrainState
from giffy_ray.training.learners import Learner
from tests.test_experiments import EXPERIMENTS
from tests.training.test_checkpoints import built, cut_down, flip_a_bit, step

State = dict[str, Any]
Case = tuple[str, str, str]  # what is done, with which experiment (YAML), with which checkpoint


class OwnError(Exception):
    """As many libraries write them: it cannot be unpickled."""

    def __init__(self, name: str, size: int):
        super().__init__(f"{name} of size {size}")


def state_of(learner: Learner) -> State:
    networks = {name: dict(network.state_dict()) for name, network in learner.networks.items()}
    return {"networks": networks, "optimizers": {name: one.state_dict() for name, one in learner.optimizers.items()}}


def tensors_in(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_in(value, f"{name}/{key}")
    else:
        yield name, state


def assert_equal_bits(found: State, expected: State) -> None:
    """Values, dtypes, devices and strides: the optimiser walks through its state as through the weights."""
    ours, theirs = dict(tensors_in(found)), dict(tensors_in(expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if torch.is_tensor(value):
            same = (ours[name].dtype, ours[name].device, ours[name].stride())
            assert same == (value.dtype, value.device, value.stride()), name
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


@contextmanager
def nothing_is_read() -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this rank reads")

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoints, storage):
            for name in ("filesystem_of", "read_text", "read_bytes", "safe_open"):
                patch.setattr(module, name, fail, raising=False)
        yield


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _worker(rank: int, sizes: list[int], ports: list[int], cases: list[Case], folder: str) -> None:
    """Is one of as many workers as each of `sizes` says, one after the other: it takes seconds to start a process."""
    torch.set_num_threads(1)
    for workers, port in zip(sizes, ports, strict=True):
        if rank < workers:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
            torch.save(outcomes_of(cases), f"{folder}/{workers}-{rank}")
            dist.barrier()
            dist.destroy_process_group()


def outcomes_of(cases: list[Case]) -> list[Any]:
    rank, workers = distributed.rank(), distributed.world_size()
    outcomes: list[Any] = []
    for what, yaml, location in cases:
        experiment = from_yaml(yaml)
        learner = learners.build(override(experiment, {"train.seed": 10 + rank}), torch.device("cpu"), steps=10)
        with nothing_is_read() if rank else pytest.MonkeyPatch.context():
            if what == "begin":
                position = train_loop.begin(learner, experiment)
                outcomes.append({"state": state_of(learner), "position": vars(position)})
            elif what == "restore":
                outcomes.append(error_of(lambda: checkpoints.restore(location, learner)))  # noqa: B023
            elif what == "start_from":
                outcomes.append(error_of(lambda: checkpoints.load_pretrained(location, learner)))  # noqa: B023
            else:
                outcomes.append(error_of(lambda: disturbed(what, location, learner, rank)))  # noqa: B023
    outcomes.append(
        [error_of(lambda: distributed.on_each(lambda: fails_on(rank, workers - 1))), distributed.on_first(lambda: rank)]
    )
    outcomes.append(
        [error_of(lambda: distributed.on_first(lambda: fails_on(rank, 0))), distributed.on_first(lambda: rank)]
    )
    outcomes.append([*shared(OF_EACH_DTYPE, rank), *shared(OF_EACH_DTYPE[-1:], rank), *shared(OF_EACH_DTYPE[:1], rank)])
    return outcomes


def disturbed(what: str, location: str, learner: Learner, rank: int) -> None:
    """Rank 0 cannot read the third tensor; or rank 1 has a network of other shapes."""
    if what == "unreadable":
        copy, read = checkpoints._copy_tensor, []

        def copy_two(path: Path, target: Any) -> None:
            read.append(path)
            if len(read) > 2:
                raise OSError("Input/output error")
            copy(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "_copy_tensor", copy_two)
            checkpoints.restore(location, learner)
    else:
        if rank == 1:
            learner.networks = {name: torch.nn.Linear(2, 3) for name in learner.networks}
        checkpoints.restore(location, learner)


def fails_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise OwnError("a file", rank)


NAN = torch.tensor([0x7FC00001, 0x7F800001, 0], dtype=torch.int32).view(torch.float32)  # of two payloads
OF_EACH_DTYPE = [
    NAN,
    torch.tensor(7, dtype=torch.int64),
    torch.tensor([True, False]),
    torch.arange(3, dtype=torch.bfloat16),
    torch.ones(0),
    torch.arange(24.0, dtype=torch.float64).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
]


def shared(wanted: list[torch.Tensor], rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = [each.clone() if rank == 0 else torch.zeros_like(each) for each in wanted]
    distributed.broadcast(own, torch.device("cpu"))
    return list(zip(own, wanted, strict=True))


def among(sizes: list[int], cases: list[Case]) -> dict[int, list[list[Any]]]:
    """By the number of workers, and for each of them, what came of the cases."""
    with tempfile.TemporaryDirectory() as folder:
        words = (sizes, [free_port() for _ in sizes], cases, folder)
        torch.multiprocessing.spawn(_worker, words, nprocs=max(sizes))  # type: ignore[attr-defined]
        return {
            workers: [torch.load(f"{folder}/{workers}-{rank}", weights_only=True) for rank in range(workers)]
            for workers in sizes
        }


def saved(experiment: Experiment, place: Path) -> Learner:
    """A checkpoint after three steps of training, and the learner as it was then."""
    learner = built(experiment)
    for number in range(3):
        step(learner, experiment, number)
    place.mkdir(parents=True)
    checkpoints.Snapshot(learner, experiment, TrainState(3, {"val/psnr": 20.5}, {"loss": 0.1 + 0.2})).save(place)
    return learner


def test_one_worker_reads_a_checkpoint_and_all_have_it_bit_by_bit(tmp_path: Path, bucket: str):
    paths = {path.stem: path for path in EXPERIMENTS}
    cases, expected = [], []
    for name, layout in (("demo", True), ("cgan-erupting", False)):
        changes = {"name": name, "storage": str(tmp_path), "train.global_batch_size": 6, "speed.channels_last": layout}
        experiment = override(cut_down(paths[name]), changes)
        learner = saved(experiment, tmp_path / name / "checkpoint_1")
        cases.append(("begin", to_yaml(experiment), ""))
        expected.append(state_of(learner))
    place = f"{bucket}/ranks"
    checkpoints.copied(tmp_path / name / "checkpoint_1", *filesystem_of(f"{place}/{name}/checkpoint_1"))
    cases.append(("begin", to_yaml(override(experiment, {"storage": place})), ""))
    expected.append(expected[-1])
    started = override(experiment, {"name": "next", "train.init_from": name})
    cases.append(("begin", to_yaml(started), ""))

    alone = built(started)
    train_loop.begin(alone, started)
    expected.append(state_of(alone))
    damaged = tmp_path / "damaged" / "checkpoint_1"
    saved(experiment, damaged)
    flip_a_bit(damaged / "optimizers.safetensors")
    other = to_yaml(override(experiment, {"model.latent": 7}))
    whole = str(tmp_path / name / "checkpoint_1")
    failures = [
        (("restore", cases[1][1], str(damaged)), r"DamagedCheckpoint: .*optimizers\.safetensors.*sha256 differs"),
        (("restore", other, whole), r"ValueError: generator\.safetensors: of '.*' the checkpoint has shape"),
        (("start_from", other, whole), r"ConfigError: train\.init_from: .*is of another model"),
        (("start_from", other, str(tmp_path)), r"DamagedCheckpoint: .*has no manifest\.json"),
        (("unreadable", cases[1][1], whole), r"OSError: Input/output error"),
        (("other on rank 1", cases[1][1], whole), r"ValueError: .*generator.*this experiment has"),
    ]
    for workers, outcomes in among([3, 2], [*cases, *(case for case, _ in failures)]).items():
        check(workers, outcomes, expected, [words for _, words in failures])


def check(workers: int, outcomes: list[list[Any]], expected: list[State], failures: list[str]) -> None:
    for rank, (*found, on_last, on_first, of_each_dtype) in enumerate(outcomes):
        for outcome, wanted in zip(found, expected, strict=False):
            assert_equal_bits(outcome["state"], wanted)
        assert [outcome["position"]["steps_done"] for outcome in found[:4]] == [3, 3, 3, 0]
        assert found[0]["position"]["sums"] == {"loss": 0.1 + 0.2}
        assert found[4:] == outcomes[0][4 : len(found)]
        for outcome, words in zip(found[4:], failures, strict=True):
            assert re.match(words, outcome)
        for failing, told in ((workers - 1, on_last), (0, on_first)):
            kind = "OwnError" if rank == failing else "RuntimeError: OwnError"
            assert told == [f"{kind}: a file of size {failing}", 0]
        for own, wanted in of_each_dtype:
            assert own.stride() == wanted.stride()
            assert own.reshape(-1).view(torch.uint8).tolist() == wanted.reshape(-1).view(torch.uint8).tolist()
