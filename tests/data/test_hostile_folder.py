"""prepare() decodes 200 valid videos among all hostile files: no video is lost and no reference is followed."""

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
from tests.data.corpus import hostile_files, noise_mp4
from tests.data.test_hostile import AccessWatch

pytestmark = pytest.mark.usefixtures("local_ray")
VALID_VIDEOS, MEMORY_MB = 200, 1024


def list_descendants() -> Iterator[int]:
    """Yields the IDs of all processes that descend from this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        ancestor = pid
        while ancestor in parents:
            ancestor = parents[ancestor]
            if ancestor == os.getpid():
                yield pid


@contextmanager
def track_peak_mb() -> Iterator[list[float]]:
    """Samples the peak resident memory of all descendants, and yields a list whose element is the largest, in MB."""
    peak_mb, stop = [0.0], threading.Event()

    def sample_memory() -> None:
        while not stop.wait(0.2):
            for pid in list_descendants():
                with suppress(OSError, ValueError):
                    lines = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()
                    peak_mb[0] = max(peak_mb[0], int(lines[0]) / 1024 if lines else 0)

    thread = threading.Thread(target=sample_memory)
    thread.start()
    yield peak_mb
    stop.set()
    thread.join()


def test_prepare_survives_a_folder_of_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canary, folder = tmp_path / "canary.mp4", tmp_path / "videos" / "training" / "x"
    canary.write_bytes(noise_mp4())
    folder.mkdir(parents=True)
    for number in range(VALID_VIDEOS):
        (folder / f"valid {number:03}.mp4").write_bytes(moving_video(number, 10, 30))
    expected: dict[str, frozenset[str]] = {}
    for kind, hostile in hostile_files(canary).items():
        name = kind if kind.endswith(EXTENSIONS) else f"{kind}.mp4"  # other extensions are ignored
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
    (folder / "vanishing.mp4").write_bytes(noise_mp4())
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

    def read_catalog_then_delete(*arguments, **options):
        catalog = read_catalog(*arguments, **options)
        (folder / "vanishing.mp4").unlink()
        return catalog

    read_catalog = prepare.read_catalog
    monkeypatch.setattr(prepare, "read_catalog", read_catalog_then_delete)
    fields = {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs"), "data.max_reject_fraction": 0.5}
    limits = {"data.limits.decode_s": 5, "data.limits.memory_mb": MEMORY_MB}
    experiment = override(Experiment(), fields | limits | {"clip.height": 16, "clip.width": 16})
    watch = AccessWatch(canary)
    with track_peak_mb() as peak_mb:
        dataset = prepare.prepare(experiment, decoder="tests.data.hostile:sample")

    assert dataset.ids == [f"training/x/valid {number:03}.mp4" for number in range(VALID_VIDEOS)]
    rejected = {reject["id"].removeprefix("training/x/"): reject for reject in dataset.rejects}
    assert rejected.keys() == expected.keys()
    unexpected = {name: reject for name, reject in rejected.items() if reject["reason"] not in expected[name]}
    assert not unexpected
    assert all(reject["detail"] and reject["path"].startswith(str(folder)) for reject in dataset.rejects)
    assert watch.poll() == 0
    canary.read_bytes()
    assert watch.poll() != 0  # the watch works
    assert 0 < peak_mb[0] < MEMORY_MB
