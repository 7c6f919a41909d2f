"""Two hundred good videos among every hostile file there is, through Ray Data: none is lost, followed or left out."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from giffy_ray.config import Experiment, override
from giffy_ray.data import prepare
from giffy_ray.data.catalog import EXTENSIONS
from tests.conftest import moving_video
from tests.data.corpus import hostile_files, mp4
from tests.data.test_hostile import Watch

pytestmark = pytest.mark.usefixtures("local_ray")
GOOD, MEMORY_MB = 200, 1024


def below_us() -> Iterator[int]:
    """The processes that descend from this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above = pid
        while above in parents:
            above = parents[above]
            if above == os.getpid():
                yield pid


@contextmanager
def peak_of_any_process() -> Iterator[list[float]]:
    """MB: the most memory that any process below this one has held at once, looked at now and then."""
    peak, stop = [0.0], threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            for pid in below_us():
                with suppress(OSError, ValueError):
                    lines = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()
                    peak[0] = max(peak[0], int(lines[0]) / 1024 if lines else 0)

    thread = threading.Thread(target=look)
    thread.start()
    yield peak
    stop.set()
    thread.join()


def test_a_folder_full_of_traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canary, folder = tmp_path / "canary.mp4", tmp_path / "videos" / "training" / "x"
    canary.write_bytes(mp4())
    folder.mkdir(parents=True)
    for number in range(GOOD):
        (folder / f"good {number:03}.mp4").write_bytes(moving_video(number, 10, 30))
    expected: dict[str, frozenset[str]] = {}
    for kind, hostile in hostile_files(canary).items():
        name = kind if kind.endswith(EXTENSIONS) else f"{kind}.mp4"  # else it would not be taken for a video
        (folder / name).write_bytes(hostile.video)
        expected[name] = frozenset(hostile.reasons)
    (folder / "crash.mp4").write_bytes(b"crash")
    (folder / "hangs.mp4").write_bytes(b"hangs")
    (folder / "grows.mp4").write_bytes(b"grows")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "nowhere.mp4").symlink_to("not there.mp4")
    (folder / "unreadable.mp4").symlink_to("/proc/self/mem")
    (folder / "vanishing.mp4").write_bytes(mp4())
    (folder / "above").symlink_to(folder.parent)
    expected |= {
        "crash.mp4": frozenset({"crash"}),
        "hangs.mp4": frozenset({"timeout"}),
        "grows.mp4": frozenset({"memory"}),
        "pipe.mp4": frozenset({"not_file"}),
        "folder.mp4": frozenset({"not_file"}),
        "loop.mp4": frozenset({"missing", "not_file", "unreadable"}),
        "nowhere.mp4": frozenset({"missing"}),
        "unreadable.mp4": frozenset({"unreadable"}),
        "vanishing.mp4": frozenset({"missing"}),
    }
    assert len(expected) >= 40

    def listed_before_it_vanished(*arguments, **words):
        catalog = read(*arguments, **words)
        (folder / "vanishing.mp4").unlink()
        return catalog

    read = prepare.read_catalog
    monkeypatch.setattr(prepare, "read_catalog", listed_before_it_vanished)
    fields = {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs"), "data.max_reject_fraction": 0.5}
    limits = {"data.limits.decode_s": 5, "data.limits.memory_mb": MEMORY_MB}
    experiment = override(Experiment(), fields | limits | {"clip.height": 16, "clip.width": 16})
    watch = Watch(canary)
    with peak_of_any_process() as peak:
        store = prepare.prepare(experiment, decoder="tests.data.hostile:sample")

    assert store.ids == [f"training/x/good {number:03}.mp4" for number in range(GOOD)]
    rejected = {reject["id"].removeprefix("training/x/"): reject for reject in store.rejects}
    assert rejected.keys() == expected.keys()
    wrong = {name: reject for name, reject in rejected.items() if reject["reason"] not in expected[name]}
    assert not wrong
    assert all(reject["detail"] and reject["path"].startswith(str(folder)) for reject in store.rejects)
    assert watch.seen() == 0
    canary.read_bytes()
    assert watch.seen() != 0  # it would have been noticed
    assert 0 < peak[0] < MEMORY_MB
