import functools
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest

from giffy_ray.config import ClipConfig, ConfigError, SyntheticConfig
from giffy_ray.data.decode import decode_clip
from giffy_ray.data.synthetic import dataset

SETTINGS = SyntheticConfig(training_clips=3, validation_clips=2, test_clips=2, ood_clips=1, seed=4)


def test_no_seed_is_in_two_splits():
    planned = dataset.plan(SETTINGS)
    assert len(planned) == 2 * (3 + 2 + 2 + 1)
    for category in ("erupting", "skiing"):
        seeds = [one.seed for one in planned if one.category == category]
        assert len(set(seeds)) == len(seeds) == 8
    # A larger set holds the smaller one, and another seed shares nothing with it.
    larger = dataset.plan(SyntheticConfig(training_clips=9, validation_clips=9, test_clips=9, ood_clips=9, seed=4))
    assert set(planned) <= set(larger)
    assert not {one.seed for one in larger} & {one.seed for one in dataset.plan(SyntheticConfig(seed=5))}


def test_only_the_categories_that_are_asked_for_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[dataset.Planned] = []
    monkeypatch.setattr(dataset, "render_all", lambda root, videos: drawn.extend(videos))
    skiing = dataset.ensure(str(tmp_path), SETTINGS, ["skiing"])
    assert set(drawn) == {one for one in dataset.plan(SETTINGS) if one.category == "skiing"}
    drawn.clear()
    both = [dataset.ensure(str(tmp_path), SETTINGS, names) for names in ([], ["skiing", "erupting"])]
    assert drawn == dataset.plan(SETTINGS) * 2
    assert both[0] == both[1] != skiing
    with pytest.raises(ConfigError, match=r"data\.categories: .* erupting and skiing \(value 'sking'\)"):
        dataset.ensure(str(tmp_path), SETTINGS, ["erupting", "sking"])


def test_a_video_is_h264_and_the_same_every_time():
    planned = dataset.plan(SETTINGS)[0]
    video = dataset.video(planned)
    assert video == dataset.video(planned)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (256, 256, 30, 90)
    assert decode_clip(video, ClipConfig()).shape == (30, 64, 64, 3)


def test_a_video_is_there_whole_or_not_at_all_and_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planned = dataset.plan(SETTINGS)[:3]
    left_by_others = tmp_path / planned[1].path
    left_by_others.parent.mkdir(parents=True)
    left_by_others.write_bytes(b"half a vid")

    def video(one: dataset.Planned) -> bytes:
        found = tmp_path / one.path
        assert not found.exists() or found.read_bytes() == (b"half a vid" if one is planned[1] else of(one))
        return of(one)

    def of(one: dataset.Planned) -> bytes:
        return one.name.encode() * 1000

    monkeypatch.setattr(dataset, "video", video)
    dataset._render(str(tmp_path), planned)
    assert [(tmp_path / one.path).read_bytes() for one in planned] == [of(one) for one in planned]
    before = {one: (tmp_path / one.path).stat() for one in planned}
    monkeypatch.setattr(dataset, "video", of)
    dataset._render(str(tmp_path), planned)  # as a second job does that began at the same time
    # Another time of change would make it another video to the store.
    assert {one: (tmp_path / one.path).stat().st_mtime_ns for one in planned} == {
        one: stat.st_mtime_ns for one, stat in before.items()
    }
    assert {path.name for path in left_by_others.parent.iterdir()} == {one.name for one in planned}


class CountingRay:
    """Stands for Ray: tasks run when they are asked for, and each look at what is done costs one for each task."""

    def __init__(self) -> None:
        self.looked_at, self.most = 0, 0

    def remote(self, **_: object) -> Any:
        return lambda function: SimpleNamespace(remote=lambda *words: functools.partial(function, *words))

    def wait(self, tasks: list) -> tuple[list, list]:
        self.looked_at += len(tasks)
        self.most = max(self.most, len(tasks))
        return tasks[:1], tasks[1:]

    def get(self, tasks: list) -> list:
        return [task() for task in tasks]


def test_rendering_looks_at_a_bounded_number_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray, rendered = CountingRay(), []
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(dataset, "_render", lambda root, part: len(rendered.extend(part) or part))
    videos = [dataset.Planned("training", "skiing", seed) for seed in range(20_002)]
    dataset.render_all(str(tmp_path), videos)
    assert rendered == videos
    assert len((tmp_path / "trainingSet.csv").read_text().splitlines()) == len(videos)
    assert ray.most <= 256
    assert ray.looked_at <= 256 * 5_001  # 12,507,501 if all were looked at each time
