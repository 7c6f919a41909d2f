"""What takes minutes: jobs that are killed. Run by `make chaos`."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from giffy_ray.data.store import Store
from tests.conftest import moving_video

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parent.parent
VIDEOS = 3000


def prepare_job(videos: Path, storage: Path) -> subprocess.Popen:
    words = ["tests/tiny.yaml", f"data.root={videos}", f"storage={storage}"]
    # In a process group of its own, so that nothing outside is hit; its Ray ends with it.
    return subprocess.Popen(
        [sys.executable, "jobs/prepare.py", *words],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def shards_in(storage: Path) -> dict[str, tuple[int, int]]:
    """Every finished file of the store: name -> inode and time of writing."""
    files = [path for path in storage.glob("stores/*/shards/*") if not path.name.endswith(".partial")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def store_in(storage: Path) -> Store:
    (place,) = storage.glob("stores/*/sets/*")
    return Store(str(place))


def test_a_job_that_is_killed_three_times_ends_with_what_an_undisturbed_one_ends_with(tmp_path: Path):
    videos = tmp_path / "videos"
    for number in range(VIDEOS):
        path = videos / ("cats", "dogs")[number % 2] / f"{number:04}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number % 50 == 7 else moving_video(number, 15, 30))

    drawn, seen = random.Random(0), {}
    for kill in range(3):
        job, wanted = prepare_job(videos, tmp_path / "killed"), (kill + 1) * 40 + drawn.randrange(20)
        while len(shards_in(tmp_path / "killed")) < wanted:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
        time.sleep(2)  # for its Ray to notice
        now = shards_in(tmp_path / "killed")
        assert seen.items() <= now.items()  # nothing that was stored is written again
        seen = now
    for storage in ("killed", "whole"):
        job = prepare_job(videos, tmp_path / storage)
        out, _ = job.communicate(timeout=500)
        assert job.returncode == 0, out
    assert seen.items() <= shards_in(tmp_path / "killed").items()

    killed, whole = store_in(tmp_path / "killed"), store_in(tmp_path / "whole")
    assert len(whole) == VIDEOS - VIDEOS // 50
    assert killed.ids == whole.ids
    assert killed.rejects == whole.rejects
    assert killed.fingerprint == whole.fingerprint
    sums = [hashlib.sha256(store.gather(np.arange(len(store)))).hexdigest() for store in (killed, whole)]
    assert sums[0] == sums[1]
    # Even the shards are the same files, and no video is in two of them.
    assert shards_in(tmp_path / "killed").keys() == shards_in(tmp_path / "whole").keys()
    listed = pq.read_table(sorted(map(str, tmp_path.glob("killed/stores/*/shards/*.parquet"))), columns=["identity"])
    assert len(listed) == len(set(listed["identity"].to_pylist())) == VIDEOS
