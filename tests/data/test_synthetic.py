import io

import av

from giffy_ray.config import ClipConfig, SyntheticConfig
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


def test_a_video_is_h264_and_the_same_every_time():
    planned = synthetic.plan(SETTINGS)[0]
    video = synthetic.video(planned)
    assert video == synthetic.video(planned)
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (256, 256, 30, 90)
    assert decode_clip(video, ClipConfig()).shape == (30, 64, 64, 3)
