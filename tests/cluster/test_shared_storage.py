"""Whether nodes see the same local folders. A node that does not is another folder under the same name."""

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
    check_each_node,
    compare_files,
    leave_token,
    remove_token,
    root_problem,
    sample_files,
    storage_problem,
)
from giffy_ray.config import ConfigError, Experiment, override, to_yaml
from giffy_ray.training import train_loop


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "VISIBLE_S", 0.05)
    monkeypatch.setattr(shared_storage, "_LOOK_S", 0.01)


def on_each(folders: dict[str, Path], mounted: Path):
    """Asks nodes each of which has its own folder where the driver has `mounted`."""

    def ask(function, place: str, *rest):
        return {node: function(place.replace(str(mounted), str(folder), 1), *rest) for node, folder in folders.items()}

    return ask


def test_a_storage_that_all_nodes_share_is_accepted_and_left_as_it_was(tmp_path: Path):
    storage = tmp_path / "runs"
    experiment = override(Experiment(), {"storage": str(storage)})
    check_each_node(experiment, on_each({"a": storage, "b": storage}, storage))
    assert list(storage.iterdir()) == []


def test_the_driver_must_see_what_nodes_write(tmp_path: Path):
    """A mount that shows the driver's files and keeps what is written, such as an overlay."""
    storage, overlay = tmp_path / "runs", tmp_path / "overlay"

    def copied(function, token: str, *rest):
        overlay.mkdir()
        shutil.copy(token, overlay)
        return {"a": function(str(overlay / Path(token).name), *rest)._replace(file=f"{token}.there")}

    with pytest.raises(
        ConfigError, match=rf"storage: 1 of 1 nodes .*{storage}.*node a: its answer does not arrive here"
    ):
        check_each_node(override(Experiment(), {"storage": str(storage)}), copied)


def test_a_node_that_does_not_answer_or_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage = tmp_path / "runs"

    def ask(function, *rest):
        return {"a": Answer("it did not answer within 120 s"), "b": function(*rest)}

    experiment = override(Experiment(), {"storage": str(storage)})
    with pytest.raises(ConfigError, match=r"1 of 2 nodes .*\(node a: it did not answer within 120 s\)"):
        check_each_node(experiment, ask)
    token = storage / "token"
    token.write_text("ours")
    assert shared_storage.answer_token(str(token), "other", 0.0) == Answer(f"{token} holds something else")

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_text", refuse)
    answer = shared_storage.answer_token(str(token), "ours", 0.0)
    assert answer == Answer("it cannot write there: Read-only file system")


def tree(root: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"v" * size)
    return root


FILES = {"cats/a.mp4": 10, "cats/b.mp4": 20, "dogs/deep/c.mp4": 30, "list.csv": 5, ".nfs0001": 1}


def test_copies_of_the_videos_are_as_good_as_a_mount(tmp_path: Path):
    root, copy = tree(tmp_path / "videos", FILES), tree(tmp_path / "copy", FILES)
    assert sample_files(str(root)) == {name: size for name, size in FILES.items() if name != ".nfs0001"}
    os.utime(copy / "cats/a.mp4", (1, 1))
    for place in (root, root / "list.csv"):
        facts = sample_files(str(place))
        assert compare_files(str(place).replace(str(root), str(copy)), facts) == Answer("")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (shutil.rmtree, "No such file or directory: {copy}"),
        (lambda copy: (copy / "dogs/deep/c.mp4").unlink(), "No such file or directory: {copy}/dogs/deep/c.mp4"),
        (lambda copy: (copy / "cats/b.mp4").write_bytes(b"cut"), "{copy}/cats/b.mp4 has 3 bytes, not 20"),
    ],
)
def test_a_node_with_other_videos_is_refused(tmp_path: Path, change, problem: str):
    root, copy = tree(tmp_path / "videos", FILES), tree(tmp_path / "copy", FILES)
    change(copy)
    found = compare_files(str(copy), sample_files(str(root))).problem
    assert found == problem.format(copy=copy)
    experiment = override(Experiment(), {"storage": "s3://bucket/runs", "data.root": str(root)})
    with pytest.raises(ConfigError, match=r"^data\.root: 1 of 2 nodes do not share .*\(node b: "):
        check_each_node(experiment, on_each({"a": root, "b": copy}, root))


def test_few_files_of_a_large_folder_are_looked_at(tmp_path: Path):
    root = tree(tmp_path, {f"{number // 20:02}/{number}.mp4": number for number in range(400)})
    facts = sample_files(str(root))
    assert len(facts) == 64
    assert len({name.partition("/")[0] for name in facts}) == 8
    assert all((root / name).stat().st_size == size for name, size in facts.items())


def test_a_token_of_a_run_is_seen_where_its_storage_is_and_goes_with_its_process(tmp_path: Path):
    here = override(Experiment(), {"storage": str(tmp_path / "runs"), "name": "mine"})
    there = override(here, {"storage": str(tmp_path / "elsewhere")})
    assert leave_token(here, "we") == "we"
    assert storage_problem(here, "we") == ""
    assert "storage: node " in storage_problem(there, "we")
    assert f"does not share the folder '{there.storage}'" in storage_problem(there, "we")
    leave_token(here, "others")
    remove_token(here, "we")
    assert storage_problem(here, "we") == ""  # that of others is left; the lease tells whose the run is
    remove_token(here, "others")
    assert storage_problem(here, "others")
    bucket = override(here, {"storage": "s3://bucket/runs"})
    assert leave_token(bucket, "we") is None
    assert storage_problem(bucket, None) == ""
    facts = sample_files(str(tree(tmp_path / "videos", FILES)))
    assert root_problem(str(tmp_path / "videos"), facts) == ""
    assert "data.root: node " in root_problem(str(tmp_path / "copy"), facts)


class Ranks:
    """The view of rank `own` of two, the second of which does not see the storage."""

    def __init__(self, own: int, first: tuple[str, bool]):
        self.own, self.answers = own, [first, ("storage: node b does not share it", True)]

    def rank(self) -> int:
        return self.own

    def from_all(self, answer: tuple[str, bool]) -> list[tuple[str, bool]]:
        self.answers[self.own] = answer
        return self.answers


def test_a_training_on_a_node_that_does_not_share_the_storage_is_not_restarted(tmp_path: Path, monkeypatch):
    """As train_loop finds it in each of two workers, one of them on such a node."""
    experiment = override(Experiment(), {"storage": str(tmp_path / "runs"), "name": "mine"})
    unshared = override(experiment, {"storage": str(tmp_path / "elsewhere")})
    leave_token(experiment, "we")
    failure = tmp_path / "runs" / "mine" / train_loop.FAILURE
    loops = {
        0: functools.partial(train_loop.train_loop, {"experiment": SecretStr(to_yaml(experiment)), "token": "we"}),
        1: functools.partial(train_loop.train_loop, {"experiment": SecretStr(to_yaml(unshared)), "token": "we"}),
    }
    for own in (1, 0):  # only rank 0 can tell
        monkeypatch.setattr(train_loop, "ranks", Ranks(own, ("", False)))
        assert not failure.exists()
        loops[own]()
    assert failure.read_text() == "storage: node b does not share it"
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr(train_loop, "ranks", Ranks(1, ("storage: node a does not share it", True)))
    with pytest.raises(RuntimeError, match=r"node a does not share it storage: node .* does not share"):
        loops[1]()
