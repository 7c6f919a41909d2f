"""Checks of shared folders. A node that does not share one is simulated by a different folder at the same path."""

import errno
import functools
import os
import shutil
from pathlib import Path

import pytest
from pydantic import SecretStr

from giffy_ray.cluster import shared_storage
from giffy_ray.cluster.shared_storage import (
    Answer,
    check_nodes,
    compare_files,
    find_root_problem,
    find_storage_problem,
    remove_token,
    sample_files,
    write_token,
)
from giffy_ray.config import ConfigError, Experiment, override, to_yaml
from giffy_ray.training import train_loop


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "VISIBILITY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(shared_storage, "_POLL_INTERVAL_S", 0.01)


def simulate_nodes(folders: dict[str, Path], driver_folder: Path):
    """Returns a RunOnEachNode for nodes that have these folders at the path of the driver's folder."""

    def run_on_each_node(function, path: str, *args):
        return {
            node: function(path.replace(str(driver_folder), str(folder), 1), *args) for node, folder in folders.items()
        }

    return run_on_each_node


def test_a_shared_storage_is_accepted_and_left_empty(tmp_path: Path):
    storage = tmp_path / "runs"
    experiment = override(Experiment(), {"storage": str(storage)})
    check_nodes(experiment, simulate_nodes({"a": storage, "b": storage}, storage))
    assert list(storage.iterdir()) == []


def test_the_driver_must_see_the_files_of_the_nodes(tmp_path: Path):
    """A mount, such as an overlay, that shows the driver's files and keeps new ones local."""
    storage, overlay = tmp_path / "runs", tmp_path / "overlay"

    def run_on_overlay(function, token: str, *args):
        overlay.mkdir()
        shutil.copy(token, overlay)
        return {"a": function(str(overlay / Path(token).name), *args)._replace(file=f"{token}.missing")}

    with pytest.raises(
        ConfigError, match=rf"storage: 1 of 1 nodes .*{storage}.*node a: its answer does not arrive here"
    ):
        check_nodes(override(Experiment(), {"storage": str(storage)}), run_on_overlay)


def test_nodes_that_do_not_answer_or_cannot_write_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage = tmp_path / "runs"

    def run_on_each_node(function, *args):
        return {"a": Answer("it did not answer within 120 s"), "b": function(*args)}

    experiment = override(Experiment(), {"storage": str(storage)})
    with pytest.raises(ConfigError, match=r"1 of 2 nodes .*\(node a: it did not answer within 120 s\)"):
        check_nodes(experiment, run_on_each_node)
    token = storage / "token"
    token.write_text("ours")
    assert shared_storage.answer_token(str(token), "other", 0.0) == Answer(f"{token} has other contents")

    def fail(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_text", fail)
    answer = shared_storage.answer_token(str(token), "ours", 0.0)
    assert answer == Answer("it cannot write there: Read-only file system")


def write_tree(root: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"v" * size)
    return root


FILES = {"cats/a.mp4": 10, "cats/b.mp4": 20, "dogs/deep/c.mp4": 30, "list.csv": 5, ".nfs0001": 1}


def test_copies_of_the_videos_are_accepted(tmp_path: Path):
    root, copy = write_tree(tmp_path / "videos", FILES), write_tree(tmp_path / "copy", FILES)
    assert sample_files(str(root)) == {name: size for name, size in FILES.items() if name != ".nfs0001"}
    os.utime(copy / "cats/a.mp4", (1, 1))
    for path in (root, root / "list.csv"):
        sizes = sample_files(str(path))
        assert compare_files(str(path).replace(str(root), str(copy)), sizes) == Answer("")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (shutil.rmtree, "No such file or directory: {copy}"),
        (lambda copy: (copy / "dogs/deep/c.mp4").unlink(), "No such file or directory: {copy}/dogs/deep/c.mp4"),
        (lambda copy: (copy / "cats/b.mp4").write_bytes(b"cut"), "{copy}/cats/b.mp4 has 3 bytes, not 20"),
    ],
)
def test_a_node_with_other_videos_is_rejected(tmp_path: Path, change, problem: str):
    root, copy = write_tree(tmp_path / "videos", FILES), write_tree(tmp_path / "copy", FILES)
    change(copy)
    answer = compare_files(str(copy), sample_files(str(root)))
    assert answer.problem == problem.format(copy=copy)
    experiment = override(Experiment(), {"storage": "s3://bucket/runs", "data.root": str(root)})
    with pytest.raises(ConfigError, match=r"^data\.root: 1 of 2 nodes do not share .*\(node b: "):
        check_nodes(experiment, simulate_nodes({"a": root, "b": copy}, root))


def test_a_few_files_of_a_large_folder_are_sampled(tmp_path: Path):
    root = write_tree(tmp_path, {f"{number // 20:02}/{number}.mp4": number for number in range(400)})
    sizes = sample_files(str(root))
    assert len(sizes) == 64
    assert len({name.partition("/")[0] for name in sizes}) == 8
    assert all((root / name).stat().st_size == size for name, size in sizes.items())


def test_the_token_of_a_run_is_visible_on_its_storage_until_its_process_removes_it(tmp_path: Path):
    here = override(Experiment(), {"storage": str(tmp_path / "runs"), "name": "mine"})
    there = override(here, {"storage": str(tmp_path / "elsewhere")})
    assert write_token(here, "first") == "first"
    assert find_storage_problem(here, "first") == ""
    assert "storage: node " in find_storage_problem(there, "first")
    assert f"does not share the folder '{there.storage}'" in find_storage_problem(there, "first")
    write_token(here, "second")
    remove_token(here, "first")
    assert (
        find_storage_problem(here, "first") == ""
    )  # the second process's token stays; the run lock reports whose run it is
    remove_token(here, "second")
    assert find_storage_problem(here, "second")
    bucket = override(here, {"storage": "s3://bucket/runs"})
    assert write_token(bucket, "first") is None
    assert find_storage_problem(bucket, None) == ""
    sizes = sample_files(str(write_tree(tmp_path / "videos", FILES)))
    assert find_root_problem(str(tmp_path / "videos"), sizes) == ""
    assert "data.root: node " in find_root_problem(str(tmp_path / "copy"), sizes)


class Ranks:
    """`core.distributed` on one of two ranks, the second of which does not see the storage."""

    def __init__(self, rank: int, answer_of_rank_zero: tuple[str, bool]):
        self._rank = rank
        self.answers = [answer_of_rank_zero, ("storage: node b does not share it", True)]

    def rank(self) -> int:
        return self._rank

    def all_gather_object(self, answer: tuple[str, bool]) -> list[tuple[str, bool]]:
        self.answers[self._rank] = answer
        return self.answers


def test_a_training_on_a_node_that_does_not_share_the_storage_is_not_restarted(tmp_path: Path, monkeypatch):
    """Runs the training loop on two ranks, one of them on such a node."""
    experiment = override(Experiment(), {"storage": str(tmp_path / "runs"), "name": "mine"})
    unshared = override(experiment, {"storage": str(tmp_path / "elsewhere")})
    write_token(experiment, "first")
    failure = tmp_path / "runs" / "mine" / train_loop.FAILURE_FILE
    loops = {
        0: functools.partial(
            train_loop.train_loop_per_worker, {"experiment": SecretStr(to_yaml(experiment)), "token": "first"}
        ),
        1: functools.partial(
            train_loop.train_loop_per_worker, {"experiment": SecretStr(to_yaml(unshared)), "token": "first"}
        ),
    }
    for rank in (1, 0):  # only rank 0 can write the failure
        monkeypatch.setattr(train_loop, "distributed", Ranks(rank, ("", False)))
        assert not failure.exists()
        loops[rank]()
    assert failure.read_text() == "storage: node b does not share it"
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(train_loop, "distributed", Ranks(1, ("storage: node a does not share it", True)))
    with pytest.raises(RuntimeError, match=r"node a does not share it storage: node .* does not share"):
        loops[1]()
