import io
from pathlib import Path

import av
import pytest

from giffy_ray.config import ClipConfig, ConfigError, SyntheticConfig
from giffy_ray.data import synthetic
from giffy_ray.data.decode import decode_clip

SETTINGS = SyntheticConfig(training_clips=3, validation_clips=2, test_clips=2, shifted_clips=1, seed=4)


def test_no_seed_is_in_two_splits():
    planned = synthetic.plan(SETTINGS)
    assert len(planned) == 2 * (3 + 2 + 2 + 1)
    for category in ("erupting", "skiing"):
        seeds = [one.seed for one in planned if one.category == category]
        assert len(set(seeds)) == len(seeds) == 8
    # A larger set holds the smaller one, and another seed shares nothing with it.
    larger = synthetic.plan(
        SyntheticConfig(training_clips=9, validation_clips=9, test_clips=9, shifted_clips=9, seed=4)
    )
    assert set(planned) <= set(larger)
    assert not {one.seed for one in larger} & {one.seed for one in synthetic.plan(SyntheticConfig(seed=5))}


def test_only_the_categories_that_are_asked_for_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[synthetic.Planned] = []
    monkeypatch.setattr(synthetic, "render_all", lambda root, videos: drawn.extend(videos))
    skiing = synthetic.ensure(str(tmp_path), SETTINGS, ["skiing"])
    assert set(drawn) == {one for one in synthetic.plan(SETTINGS) if one.category == "skiing"}
    drawn.clear()
    both = [synthetic.ensure(str(tmp_path), SETTINGS, names) for names in ([], ["skiing", "erupting"])]
    assert drawn == synthetic.plan(SETTINGS) * 2
    assert both[0] == both[1] != skiing
    with pytest.raises(ConfigError, match=r"data\.categories: .* erupting and skiing \(value 'sking'\)"):
        synthetic.ensure(str(tmp_path), SETTINGS, ["erupting", "sking"])


def test_a_video_is_h264_and_the_same_every_time():
    planned = synthetic.plan(SETTINGS)[0]
    video = synthetic.video(planned)
    assert video == synthetic.video(planned)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (256, 256, 30, 90)
    assert decode_clip(video, ClipConfig()).shape == (30, 64, 64, 3)
