"""Videos and stores on S3: the clips are the same, and each node downloads a shard once."""

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
def node_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def list_shards(dataset: ClipDataset) -> list[str]:
    filesystem, base = filesystem_of(dataset.location.partition("/sets/")[0] + "/shards")
    return [info.path for info in filesystem.get_file_info(fs.FileSelector(base)) if info.path.endswith(".u8")]


def test_node_downloads_a_shard_once(experiment, videos, node_disk):
    dataset = prepare(experiment)
    assert [reject["id"] for reject in dataset.rejects] == ["training/x y/broken.mp4"]
    expected = np.stack([decode_clip(videos[name.removeprefix("training/")], experiment.clip) for name in dataset.ids])
    assert np.array_equal(dataset.get_clips(np.arange(4)), expected)
    (shard,) = list_shards(dataset)
    filesystem_of(experiment.storage)[0].delete_file(shard)
    assert np.array_equal(ClipDataset(dataset.location).get_clips(np.asarray([3, 1])), expected[[3, 1]])
    (copy,) = node_disk.glob("giffy_ray-*/shards/*/*.u8")
    assert copy.stat().st_size == 4 * 4 * 8 * 8 * 3


def test_damaged_download_is_not_used(experiment, node_disk):
    dataset = prepare(experiment)
    (shard,) = list_shards(dataset)
    write_bytes(f"s3://{shard}", bytes(4 * 4 * 8 * 8 * 3))
    with pytest.raises(RuntimeError, match=r"its sha256 is .* instead of .*; run jobs/prepare\.py"):
        dataset.get_clips(np.arange(4))
    assert not list(node_disk.glob("giffy_ray-*/shards/*/*.u8"))
    prepare(experiment, again=True).get_clips(np.arange(4))


def test_full_disk_is_a_config_error(experiment, monkeypatch):
    dataset = prepare(experiment)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(
        ValueError, match=r"0\.0 GB are free, .*set TMPDIR to a larger disk, or data\.cache_decoded=false"
    ):
        dataset.get_clips(np.arange(4))


def test_uncached_videos_are_read_from_the_bucket(experiment):
    cached, uncached = prepare(experiment), prepare(override(experiment, {"data.cache_decoded": False}))
    assert np.array_equal(cached.get_clips(np.arange(4)), uncached.get_clips(np.arange(4)))
