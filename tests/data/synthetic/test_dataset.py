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


def test_seeds_of_splits_are_disjoint():
    specs = dataset.plan_videos(SETTINGS)
    assert len(specs) == 2 * (3 + 2 + 2 + 1)
    for category in ("erupting", "skiing"):
        seeds = [spec.seed for spec in specs if spec.category == category]
        assert len(set(seeds)) == len(seeds) == 8
    # A larger dataset contains the smaller one; another seed shares nothing with it.
    larger = dataset.plan_videos(
        SyntheticConfig(training_clips=9, validation_clips=9, test_clips=9, ood_clips=9, seed=4)
    )
    assert set(specs) <= set(larger)
    other_seeds = {spec.seed for spec in dataset.plan_videos(SyntheticConfig(seed=5))}
    assert not {spec.seed for spec in larger} & other_seeds


def test_only_requested_categories_are_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rendered: list[dataset.VideoSpec] = []
    monkeypatch.setattr(dataset, "render_all", lambda root, videos: rendered.extend(videos))
    skiing = dataset.ensure_rendered(str(tmp_path), SETTINGS, ["skiing"])
    assert set(rendered) == {spec for spec in dataset.plan_videos(SETTINGS) if spec.category == "skiing"}
    rendered.clear()
    both = [dataset.ensure_rendered(str(tmp_path), SETTINGS, names) for names in ([], ["skiing", "erupting"])]
    assert rendered == dataset.plan_videos(SETTINGS) * 2
    assert both[0] == both[1] != skiing
    with pytest.raises(ConfigError, match=r"data\.categories: .* erupting and skiing \(value 'sking'\)"):
        dataset.ensure_rendered(str(tmp_path), SETTINGS, ["erupting", "sking"])


def test_rendered_video_is_deterministic_h264():
    spec = dataset.plan_videos(SETTINGS)[0]
    video = dataset.render_video(spec)
    assert video == dataset.render_video(spec)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (256, 256, 30, 90)
    assert decode_clip(video, ClipConfig()).shape == (30, 64, 64, 3)


def test_videos_are_written_atomically_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = dataset.plan_videos(SETTINGS)[:3]
    partial_file = tmp_path / specs[1].path
    partial_file.parent.mkdir(parents=True)
    partial_file.write_bytes(b"half a vid")

    def fake_content(spec: dataset.VideoSpec) -> bytes:
        return spec.name.encode() * 1000

    def check_file_and_render(spec: dataset.VideoSpec) -> bytes:
        path = tmp_path / spec.path
        expected = b"half a vid" if spec is specs[1] else fake_content(spec)
        assert not path.exists() or path.read_bytes() == expected
        return fake_content(spec)

    monkeypatch.setattr(dataset, "render_video", check_file_and_render)
    dataset._render(str(tmp_path), specs)
    assert [(tmp_path / spec.path).read_bytes() for spec in specs] == [fake_content(spec) for spec in specs]
    before = {spec: (tmp_path / spec.path).stat() for spec in specs}
    monkeypatch.setattr(dataset, "render_video", fake_content)
    dataset._render(str(tmp_path), specs)  # as a second job that started at the same time does
    # A new modification time would make it a different video to the catalog.
    assert {spec: (tmp_path / spec.path).stat().st_mtime_ns for spec in specs} == {
        spec: stat.st_mtime_ns for spec, stat in before.items()
    }
    assert {path.name for path in partial_file.parent.iterdir()} == {spec.name for spec in specs}


class FakeRay:
    """Runs tasks when their results are requested, and counts the tasks that `wait` examines."""

    def __init__(self) -> None:
        self.examined_tasks, self.max_in_flight = 0, 0

    def remote(self, **_: object) -> Any:
        return lambda function: SimpleNamespace(remote=lambda *arguments: functools.partial(function, *arguments))

    def wait(self, tasks: list) -> tuple[list, list]:
        self.examined_tasks += len(tasks)
        self.max_in_flight = max(self.max_in_flight, len(tasks))
        return tasks[:1], tasks[1:]

    def get(self, tasks: list) -> list:
        return [task() for task in tasks]


def test_render_all_bounds_tasks_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray, rendered = FakeRay(), []

    def fake_render(root: str, videos: list[dataset.VideoSpec]) -> int:
        rendered.extend(videos)
        return len(videos)

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(dataset, "_render", fake_render)
    videos = [dataset.VideoSpec("training", "skiing", seed) for seed in range(20_002)]
    dataset.render_all(str(tmp_path), videos)
    assert rendered == videos
    assert len((tmp_path / "trainingSet.csv").read_text().splitlines()) == len(videos)
    assert ray.max_in_flight <= 256
    assert ray.examined_tasks <= 256 * 5_001  # 12,507,501 without the bound
