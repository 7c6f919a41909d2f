from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from giffy_ray.config import ClipConfig, DataConfig
from giffy_ray.data import store as stores
from giffy_ray.data.catalog import read_catalog
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.store import Store
from tests.conftest import moving_video

CLIP = ClipConfig(frames=6, fps=10, height=16, width=16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for number in range(3):
        path = root / "training" / "x" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(moving_video(number, 20, 30))
    (root / "validation" / "y").mkdir(parents=True)
    (root / "validation" / "y" / "held.mp4").write_bytes(moving_video(9, 6, 30))
    (root / "training" / "x" / "broken.mp4").write_bytes(b"no video")
    (root / "trainingSet.csv").write_text(
        "".join(f"x/{name}.mp4,x,3,0\n" for name in ("0", "1", "2", "broken", "gone"))
    )
    return root


@pytest.fixture
def location(root: Path, tmp_path: Path) -> str:
    """A store of two shards, filled as the tasks of the Ray Data graph fill it."""
    catalog = read_catalog(str(root), DataConfig())
    location, outcomes = str(tmp_path / "store"), []
    for shard, part in enumerate(np.array_split(np.asarray(catalog.videos, dtype=object), 2)):
        rows = [{"shard": shard, "id": v.id, "path": v.path, "category": v.category, "split": v.split} for v in part]
        done = stores.decode_shard(pa.Table.from_pylist(rows), catalog.filesystem, CLIP, location)
        outcomes += done.to_pylist()
    assert not stores.is_finished(location)
    stores.finish_store(location, catalog, CLIP, outcomes)
    return location


def test_clips_come_back_by_row_whatever_shard_they_are_in(location: str, root: Path):
    store = Store(location)
    assert store.ids == [*(f"training/x/{number}.mp4" for number in range(3)), "validation/y/held.mp4"]
    expected = np.stack([decode_clip((root / clip_id).read_bytes(), CLIP) for clip_id in store.ids])
    for order in ([3, 0, 2, 1], [1, 1], []):
        assert np.array_equal(store.gather(np.asarray(order, dtype=int)), expected[order])


def test_rows_and_rejects_account_for_every_video(location: str):
    store = Store(location)
    assert {reject["id"]: reject["reason"] for reject in store.rejects} == {
        "training/x/broken.mp4": "not_video",
        "training/x/gone.mp4": "unreadable",
    }
    assert all(reject["detail"] for reject in store.rejects)
    assert store.rows_of("training").tolist() == [0, 1, 2]
    assert store.rows_of("validation").tolist() == [3]
    assert store.padded.tolist() == [
        0,
        0,
        0,
        4,
    ]  # 6 frames at 30 a second are 0.2 s: two frames at 10 a second


def test_a_video_that_nobody_accounts_for_is_an_error(root: Path, tmp_path: Path):
    catalog = read_catalog(str(root), DataConfig())
    with pytest.raises(RuntimeError, match="do not account for the 6 videos"):
        stores.finish_store(str(tmp_path / "short"), catalog, CLIP, [])
    assert not stores.is_finished(str(tmp_path / "short"))


def test_the_key_depends_on_videos_and_settings(root: Path):
    catalog = read_catalog(str(root), DataConfig())
    key = stores.store_key(catalog, CLIP)
    assert key == stores.store_key(read_catalog(str(root), DataConfig()), CLIP)
    assert key != stores.store_key(catalog, ClipConfig())
    (root / "training" / "x" / "0.mp4").write_bytes(b"changed")
    assert key != stores.store_key(read_catalog(str(root), DataConfig()), CLIP)
