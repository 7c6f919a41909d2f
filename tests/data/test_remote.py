"""Videos, store and shards on S3: the same clips, and each node brings a shard to its disk once."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from giffy_ray.config import Experiment, override
from giffy_ray.core.storage import filesystem_of, write_bytes
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.prepare import prepare
from tests.conftest import moving_video

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(autouse=True)
def disk_of_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def videos() -> dict[str, bytes]:
    return {f"x y/{number} é.mp4": moving_video(number, 20, 30) for number in range(4)}


@pytest.fixture
def experiment(bucket: str, videos: dict[str, bytes], request: pytest.FixtureRequest) -> Experiment:
    folder = f"{bucket}/{request.node.name}"
    for name, content in {**videos, "x y/broken.mp4": b"no video"}.items():
        write_bytes(f"{folder}/videos/training/{name}", content)
    fields = {"storage": f"{folder}/runs", "data.root": f"{folder}/videos"}
    return override(Experiment(), fields | {"clip.frames": 4, "clip.height": 8, "clip.width": 8})


def shards_of(store: ClipDataset) -> list[str]:
    filesystem, base = filesystem_of(store.location.partition("/sets/")[0] + "/shards")
    return [i.path for i in filesystem.get_file_info(fs.FileSelector(base)) if i.path.endswith(".u8")]


def test_a_node_brings_a_shard_once(experiment, videos, disk_of_this_node):
    store = prepare(experiment)
    assert [reject["id"] for reject in store.rejects] == ["training/x y/broken.mp4"]
    expected = np.stack([decode_clip(videos[name.removeprefix("training/")], experiment.clip) for name in store.ids])
    assert np.array_equal(store.get_clips(np.arange(4)), expected)
    (shard,) = shards_of(store)
    filesystem_of(experiment.storage)[0].delete_file(shard)
    assert np.array_equal(ClipDataset(store.location).get_clips(np.asarray([3, 1])), expected[[3, 1]])
    (copy,) = disk_of_this_node.glob("giffy_ray-*/shards/*/*.u8")
    assert copy.stat().st_size == 4 * 4 * 8 * 8 * 3


def test_what_arrives_damaged_is_not_used(experiment, disk_of_this_node):
    store = prepare(experiment)
    (shard,) = shards_of(store)
    write_bytes(f"s3://{shard}", bytes(4 * 4 * 8 * 8 * 3))
    with pytest.raises(RuntimeError, match=r"its sha256 is .*, not .*; run jobs/prepare\.py"):
        store.get_clips(np.arange(4))
    assert not list(disk_of_this_node.glob("giffy_ray-*/shards/*/*.u8"))
    prepare(experiment, again=True).get_clips(np.arange(4))


def test_a_full_disk_is_told(experiment, monkeypatch):
    store = prepare(experiment)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(
        ValueError, match=r"0\.0 GB are free, .*set TMPDIR to a larger disk, or data\.cache_decoded=false"
    ):
        store.get_clips(np.arange(4))


def test_without_a_store_the_videos_are_read_from_the_bucket_each_time(experiment):
    kept, not_kept = prepare(experiment), prepare(override(experiment, {"data.cache_decoded": False}))
    assert np.array_equal(kept.get_clips(np.arange(4)), not_kept.get_clips(np.arange(4)))
