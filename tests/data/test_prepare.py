"""prepare() through Ray Data: only new videos are decoded, and problems are reported."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from giffy_ray.config import ConfigError, Experiment, override
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.prepare import prepare
from tests.conftest import moving_video

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    root = tmp_path / "videos" / "training" / "x"
    root.mkdir(parents=True)
    for number in range(4):
        (root / f"{number}.mp4").write_bytes(moving_video(number, 20, 30))
    return override(
        Experiment(),
        {"clip.frames": 4, "clip.height": 8, "clip.width": 8}
        | {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs"), "data.max_reject_fraction": 0.5},
    )


def read_mtimes(tmp_path: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/stores/*/shards/*")}


def test_prepare_decodes_only_new_videos(experiment, tmp_path, capsys):
    first = prepare(experiment)
    assert "4 clips" in capsys.readouterr().out
    before = read_mtimes(tmp_path)
    assert prepare(experiment).location == first.location
    assert capsys.readouterr().out == ""
    (tmp_path / "videos" / "training" / "x" / "4.mp4").write_bytes(moving_video(4, 20, 30))
    more = prepare(experiment)
    assert "1 clips" in capsys.readouterr().out
    assert before.items() < read_mtimes(tmp_path).items()
    for index, clip_id in enumerate(more.ids):
        video = (tmp_path / "videos" / clip_id).read_bytes()
        assert np.array_equal(more.get_clips(np.asarray([index]))[0], decode_clip(video, experiment.clip))


def test_rejects_are_printed_by_name(experiment, tmp_path, capsys):
    for name in ("-rf.mp4", "new\nline.mp4", "with space é.mp4"):
        (tmp_path / "videos" / "training" / "x" / name).write_bytes(b"no video")
    dataset = prepare(experiment)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "3 of 7 videos rejected (3 not_video):"
    assert lines[1].startswith("  training/x/-rf.mp4: not_video: not readable as mp4, mov, mkv, webm or avi: ")
    assert lines[2].startswith(r"  training/x/new\nline.mp4: not_video: ")
    assert lines[3].startswith("  training/x/with space é.mp4: not_video: ")
    assert lines[4] == f"  {dataset.location}/rejects.parquet"


def test_too_many_rejects_raise_after_all_videos_were_tried(experiment, tmp_path):
    for number in range(5):
        (tmp_path / "videos" / "training" / "x" / f"broken {number}.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"data\.max_reject_fraction: 5 of 9 .*\(value 0\.5\).*rejects\.parquet"):
        prepare(experiment)
    assert len(prepare(override(experiment, {"data.max_reject_fraction": 0.6}))) == 4


def test_dataset_that_does_not_fit_is_rejected_before_decoding(experiment, tmp_path, monkeypatch):
    # 4 clips of 4x8x8x3 bytes are 3,072 bytes.
    with pytest.raises(ConfigError, match=r"data\.cache_max_gb: 4 more videos take about 0\.0 GB.*\(value 3e-06\)"):
        prepare(override(experiment, {"data.cache_max_gb": 3e-6}))
    assert not read_mtimes(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3071))
    with pytest.raises(ConfigError, match="storage: 4 videos take about"):
        prepare(experiment)
    monkeypatch.undo()
    assert len(prepare(override(experiment, {"data.cache_max_gb": 4e-6}))) == 4


def test_again_repairs_damage_and_retries_rejects(experiment, tmp_path, capsys):
    tight = override(experiment, {"data.limits.pixels": 64 * 48 - 1})
    with pytest.raises(ConfigError, match="4 of 4 videos"):
        prepare(tight)
    assert "4 too_large" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="4 of 4 videos"):
        prepare(experiment)  # a prepared dataset does not change without `again`
    dataset = prepare(experiment, again=True)
    assert len(dataset) == 4
    clips = dataset.get_clips(np.arange(4))
    (shard,) = tmp_path.glob("runs/stores/*/shards/*.u8")
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert np.array_equal(prepare(experiment, again=True).get_clips(np.arange(4)), clips)
    assert f"{shard}: its sha256 is " in capsys.readouterr().err
    before = read_mtimes(tmp_path)
    prepare(experiment, again=True)
    assert read_mtimes(tmp_path) == before
