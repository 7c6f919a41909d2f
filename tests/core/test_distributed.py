"""Restoring a checkpoint on several ranks: rank 0 reads it, and all get the same state or the same error."""

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
from giffy_ray.training import checkpoint_format, checkpoint_selection, checkpoints, learners, train_loop
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.learners import Learner
from tests.test_experiments import EXPERIMENTS
from tests.training.test_checkpoints import build_learner, flip_bit, shrink_experiment, step

State = dict[str, Any]
Case = tuple[str, str, str]  # action, experiment as YAML, checkpoint


class UnpicklableError(Exception):
    """An exception that cannot be unpickled, as many libraries define them."""

    def __init__(self, name: str, size: int):
        super().__init__(f"{name} of size {size}")


def state_of(learner: Learner) -> State:
    networks = {name: dict(network.state_dict()) for name, network in learner.networks.items()}
    optimizers = {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
    return {"networks": networks, "optimizers": optimizers}


def flatten_state(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from flatten_state(value, f"{name}/{key}")
    else:
        yield name, state


def assert_equal_bits(actual: State, expected: State) -> None:
    """Compares values, dtypes, devices and strides, which must match those of the weights for the optimizer."""
    actual_values, expected_values = dict(flatten_state(actual)), dict(flatten_state(expected))
    assert actual_values.keys() == expected_values.keys()
    for name, value in expected_values.items():
        actual_value = actual_values[name]
        if torch.is_tensor(value):
            layout = (actual_value.dtype, actual_value.device, actual_value.stride())
            assert layout == (value.dtype, value.device, value.stride()), name
            assert torch.equal(actual_value, value), name
        else:
            assert actual_value == value, name


@contextmanager
def forbid_reading() -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this rank must not read")

    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint_format, checkpoint_selection, checkpoints, storage):
            for name in ("filesystem_of", "read_text", "read_bytes", "safe_open", "open_stream", "is_file"):
                patch.setattr(module, name, fail, raising=False)
        yield


def describe_error(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _run_rank(rank: int, world_sizes: list[int], ports: list[int], cases: list[Case], folder: str) -> None:
    """Runs as one rank of each world size in turn, because starting a process takes seconds."""
    torch.set_num_threads(1)
    for world_size, port in zip(world_sizes, ports, strict=True):
        if rank < world_size:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
            torch.save(run_cases(cases), f"{folder}/{world_size}-{rank}")
            dist.barrier()
            dist.destroy_process_group()


def run_cases(cases: list[Case]) -> list[Any]:
    """Returns the outcome of each case, then those of the helpers of `distributed`."""
    rank = distributed.rank()
    last_rank = distributed.world_size() - 1
    outcomes: list[Any] = []
    for action, yaml, path in cases:
        experiment = from_yaml(yaml)
        learner = learners.build(override(experiment, {"train.seed": 10 + rank}), torch.device("cpu"), steps=10)
        with forbid_reading() if rank else pytest.MonkeyPatch.context():
            if action == "initialize":
                state = train_loop.restore_or_initialize(learner, experiment)
                outcomes.append({"state": state_of(learner), "train_state": vars(state)})
            elif action == "restore":
                outcomes.append(describe_error(lambda: checkpoints.restore(path, learner)))  # noqa: B023
            elif action == "load_pretrained":
                outcomes.append(describe_error(lambda: checkpoints.load_pretrained(path, learner)))  # noqa: B023
            else:
                outcomes.append(describe_error(lambda: restore_with_fault(action, path, learner, rank)))  # noqa: B023
    error_on_last = describe_error(lambda: distributed.run_on_all_ranks(lambda: fail_on_rank(rank, last_rank)))
    outcomes.append([error_on_last, distributed.run_on_rank_zero(lambda: rank)])
    error_on_first = describe_error(lambda: distributed.run_on_rank_zero(lambda: fail_on_rank(rank, 0)))
    outcomes.append([error_on_first, distributed.run_on_rank_zero(lambda: rank)])
    groups = (TENSORS, TENSORS[-1:], TENSORS[:1])
    outcomes.append([pair for tensors in groups for pair in broadcast_copies(tensors, rank)])
    return outcomes


def restore_with_fault(fault: str, path: str, learner: Learner, rank: int) -> None:
    """Restores where rank 0 cannot read the third tensor, or where rank 1 has a network of other shapes."""
    if fault == "unreadable":
        copy_tensor = checkpoint_format.copy_tensor
        read_files = []

        def copy_two(file: Path, target: Any) -> None:
            read_files.append(file)
            if len(read_files) > 2:
                raise OSError("Input/output error")
            copy_tensor(file, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "copy_tensor", copy_two)
            checkpoints.restore(path, learner)
    else:
        if rank == 1:
            learner.networks = {name: torch.nn.Linear(2, 3) for name in learner.networks}
        checkpoints.restore(path, learner)


def fail_on_rank(rank: int, failing_rank: int) -> None:
    if rank == failing_rank:
        raise UnpicklableError("a file", rank)


NAN = torch.tensor([0x7FC00001, 0x7F800001, 0], dtype=torch.int32).view(torch.float32)  # two NaN payloads
TENSORS = [
    NAN,
    torch.tensor(7, dtype=torch.int64),
    torch.tensor([True, False]),
    torch.arange(3, dtype=torch.bfloat16),
    torch.ones(0),
    torch.arange(24.0, dtype=torch.float64).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
]


def broadcast_copies(tensors: list[torch.Tensor], rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Broadcasts `tensors` from rank 0 into zeros. Returns pairs of received and expected tensors."""
    received = [tensor.clone() if rank == 0 else torch.zeros_like(tensor) for tensor in tensors]
    distributed.broadcast_tensors(received, torch.device("cpu"))
    return list(zip(received, tensors, strict=True))


def run_on_ranks(world_sizes: list[int], cases: list[Case]) -> dict[int, list[list[Any]]]:
    """Returns the outcomes of the cases by world size and rank."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_sizes, [free_port() for _ in world_sizes], cases, folder)
        torch.multiprocessing.spawn(_run_rank, arguments, nprocs=max(world_sizes))  # type: ignore[attr-defined]
        return {
            world_size: [torch.load(f"{folder}/{world_size}-{rank}", weights_only=True) for rank in range(world_size)]
            for world_size in world_sizes
        }


def save_trained(experiment: Experiment, folder: Path) -> Learner:
    """Saves a checkpoint after three training steps and returns the learner at that moment."""
    learner = build_learner(experiment)
    for number in range(3):
        step(learner, experiment, number)
    folder.mkdir(parents=True)
    checkpoints.Snapshot(learner, experiment, TrainState(3, {"val/psnr": 20.5}, {"loss": 0.1 + 0.2})).save(folder)
    return learner


def test_rank_zero_reads_a_checkpoint_and_all_ranks_get_it_bit_by_bit(tmp_path: Path, bucket: str):
    paths = {path.stem: path for path in EXPERIMENTS}
    cases, expected = [], []
    for name, channels_last in (("demo", True), ("cgan-erupting", False)):
        changes = {
            "name": name,
            "storage": str(tmp_path),
            "train.global_batch_size": 6,
            "speed.channels_last": channels_last,
        }
        experiment = override(shrink_experiment(paths[name]), changes)
        learner = save_trained(experiment, tmp_path / name / "checkpoint_1")
        cases.append(("initialize", to_yaml(experiment), ""))
        expected.append(state_of(learner))
    bucket_storage = f"{bucket}/ranks"
    checkpoint_format.copy_checkpoint(
        tmp_path / name / "checkpoint_1", *filesystem_of(f"{bucket_storage}/{name}/checkpoint_1")
    )
    cases.append(("initialize", to_yaml(override(experiment, {"storage": bucket_storage})), ""))
    expected.append(expected[-1])
    initialized = override(experiment, {"name": "next", "train.init_from": name})
    cases.append(("initialize", to_yaml(initialized), ""))

    single_rank = build_learner(initialized)
    train_loop.restore_or_initialize(single_rank, initialized)
    expected.append(state_of(single_rank))
    corrupt = tmp_path / "corrupt" / "checkpoint_1"
    save_trained(experiment, corrupt)
    flip_bit(corrupt / "optimizers.safetensors")
    different = to_yaml(override(experiment, {"model.latent": 7}))
    valid = str(tmp_path / name / "checkpoint_1")
    failures = [
        (("restore", cases[1][1], str(corrupt)), r"CorruptCheckpoint: .*optimizers\.safetensors.*sha256 differs"),
        (("restore", different, valid), r"ValueError: generator\.safetensors: for '.*' the checkpoint has shape"),
        (("load_pretrained", different, valid), r"ConfigError: train\.init_from: .*belongs to a different model"),
        (("load_pretrained", different, str(tmp_path)), r"CorruptCheckpoint: .*has no manifest\.json"),
        (("unreadable", cases[1][1], valid), r"OSError: Input/output error"),
        (("other on rank 1", cases[1][1], valid), r"ValueError: .*generator.*this experiment has"),
    ]
    outcomes_by_world_size = run_on_ranks([3, 2], [*cases, *(case for case, _ in failures)])
    for world_size, outcomes in outcomes_by_world_size.items():
        check_outcomes(world_size, outcomes, expected, [pattern for _, pattern in failures])


def check_outcomes(
    world_size: int, outcomes: list[list[Any]], expected: list[State], error_patterns: list[str]
) -> None:
    for rank, (*case_outcomes, on_last, on_first, broadcast_pairs) in enumerate(outcomes):
        for outcome, expected_state in zip(case_outcomes, expected, strict=False):
            assert_equal_bits(outcome["state"], expected_state)
        assert [outcome["train_state"]["steps_done"] for outcome in case_outcomes[:4]] == [3, 3, 3, 0]
        assert case_outcomes[0]["train_state"]["sums"] == {"loss": 0.1 + 0.2}
        assert case_outcomes[4:] == outcomes[0][4 : len(case_outcomes)]
        for outcome, pattern in zip(case_outcomes[4:], error_patterns, strict=True):
            assert re.match(pattern, outcome)
        for failing_rank, outcome in ((world_size - 1, on_last), (0, on_first)):
            kind = "UnpicklableError" if rank == failing_rank else "RuntimeError: UnpicklableError"
            assert outcome == [f"{kind}: a file of size {failing_rank}", 0]
        for received, expected_tensor in broadcast_pairs:
            assert received.stride() == expected_tensor.stride()
            received_bytes = received.reshape(-1).view(torch.uint8).tolist()
            assert received_bytes == expected_tensor.reshape(-1).view(torch.uint8).tolist()
