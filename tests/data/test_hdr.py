"""Decoded HDR and wide-gamut colours match the definitions of ITU-R BT.2100 and FFmpeg's own tone mapping."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc

from giffy_ray.config import ClipConfig, LimitsConfig
from giffy_ray.data import shards
from giffy_ray.data.colour import to_bt709
from giffy_ray.data.decode import DecodedClip, RejectedVideo, sample_clip
from giffy_ray.data.prepare import _print_hdr_count
from giffy_ray.data.sandbox import Sandbox
from tests.conftest import grey_video

NITS = [0, 0.1, 1, 5, 10, 26, 50, 60, 100, 150, 203, 300, 400, 600, 1000, 2000, 4000, 10_000]
WHITE_NITS = 203  # ITU-R BT.2408: diffuse white
NAMES = {"pq": "smpte2084", "hlg": "arib-std-b67", "sdr": "bt2020-10"}
PEAKS = {"pq": 10_000 / WHITE_NITS, "hlg": 1000 / WHITE_NITS}
BT2020 = "colorprim=bt2020:colormatrix=bt2020nc"
# Converts linear BT.2020 RGB to BT.709: ITU-R BT.2087.
TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def pq_signal(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, table 4: the inverse EOTF."""
    power = (np.asarray(nits) / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_signal(scene: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, table 5: the OETF."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.asarray(scene, dtype=float)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def mobius(light: np.ndarray, peak: float, knee: float = 0.3) -> np.ndarray:
    """The curve of FFmpeg's vf_tonemap.c, derived from its conditions: slope 1 up to the knee, and value 1 at the peak.

    1 is diffuse white.
    """
    # (light + a) / (light + b) * scale, fitted to value and slope at the knee and to the value at the peak.
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    scale = (peak + b) / (peak + a)
    return np.where(light <= knee, light, scale * (light + a) / (light + b))


def to_display_levels(light: np.ndarray) -> np.ndarray:
    """8-bit levels of a display (ITU-R BT.1886) for linear light, where diffuse white is 1."""
    return 255 * np.clip(light, 0, 1) ** (1 / 2.4)


def encode_colours(signals: np.ndarray, transfer: str, tags: str = BT2020) -> bytes:
    """Encodes one uniform frame per R'G'B' colour, [frames, 3] in 0..1, in 10 bits with the BT.2020 matrix."""
    red, green, blue = np.asarray(signals, dtype=float).T
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    planes = (64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746)
    out = io.BytesIO()
    params = ":".join(filter(None, (tags, transfer and f"transfer={transfer}")))
    with av.open(out, "w", format="mp4") as container:
        options = {"qp": "0", "preset": "ultrafast", "x264-params": params}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv444p10le"
        for number, levels in enumerate(zip(*planes, strict=True)):
            frame = av.VideoFrame(32, 32, "yuv444p10le")
            for plane, level in zip(frame.planes, levels, strict=True):
                plane.update(round(level).to_bytes(2, "little") * (plane.buffer_size // 2))
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def decode(video: bytes, frames: int) -> DecodedClip:
    return sample_clip(video, ClipConfig(frames=frames, fps=10, height=16, width=16))


def decode_colours(video: bytes, frames: int) -> np.ndarray:
    """Decodes uniform frames: float64 [frames, 3]."""
    clip = decode(video, frames).clip
    assert (clip == clip[:, :1, :1]).all()
    return clip[:, 0, 0].astype(float)


def to_grey(signals: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(signals)[:, None], 3, axis=1)


def test_pq_greys_follow_tone_curve():
    levels = decode_colours(encode_colours(to_grey(pq_signal(np.array(NITS))), NAMES["pq"]), len(NITS))
    expected = to_display_levels(mobius(np.array(NITS) / WHITE_NITS, PEAKS["pq"]))
    assert np.abs(levels - expected[:, None]).max() <= 1.5
    level_at = dict(zip(NITS, levels[:, 1], strict=True))
    assert level_at[0] == 0 and level_at[10_000] == 255
    assert level_at[WHITE_NITS] == pytest.approx(0.85 * 255, abs=4)
    assert level_at[26] == pytest.approx(255 * (26 / WHITE_NITS) ** (1 / 2.4), abs=1)  # below the knee: unchanged
    assert (np.diff(levels[:, 1]) >= 0).all() and level_at[1000] < level_at[4000] < 255


def test_hlg_greys_follow_tone_curve():
    scene = np.linspace(0, 1, 30)
    levels = decode_colours(encode_colours(to_grey(hlg_signal(scene)), NAMES["hlg"]), 30)
    expected = to_display_levels(mobius(1000 * scene**1.2 / WHITE_NITS, PEAKS["hlg"]))
    assert np.abs(levels - expected[:, None]).max() <= 1.5
    white = decode_colours(encode_colours(to_grey(np.full(3, 0.75)), NAMES["hlg"]), 3)  # ITU-R BT.2408: 203 nits
    assert white == pytest.approx(0.85 * 255, abs=4)


def decode_with_ffmpeg(video: bytes, transfer: str) -> np.ndarray:
    """float64 [frames, 3]: decoded with FFmpeg's zscale and tonemap filters."""
    tonemap = f"tonemap=mobius:desat=0:peak={PEAKS[transfer]}," if transfer in PEAKS else ""
    light = f"zscale=t=linear:npl={WHITE_NITS},format=gbrpf32le,zscale=p=bt709,{tonemap}zscale=t=bt709,format=gbrp"
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(video)
        command = ["ffmpeg", "-v", "error", "-i", file.name, "-vf", light, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 32, 32, 3)[:, 16, 16].astype(float)


def has_zscale() -> bool:
    if not shutil.which("ffmpeg"):
        return False
    listed = subprocess.run(["ffmpeg", "-v", "error", "-filters"], capture_output=True, check=True).stdout
    return b"zscale" in listed


@pytest.mark.skipif(not has_zscale(), reason="needs ffmpeg with zscale; the closed-form tests do not")
@pytest.mark.parametrize(
    "transfer", ["pq", "sdr"]
)  # for HLG, zscale raises each channel to 1.2 instead of the luminance
def test_colours_match_ffmpegs_conversion(transfer: str):
    signals = np.random.default_rng(0).uniform(0, 1, (30, 3))
    signals[:3] = np.eye(3) * 0.7
    video = encode_colours(signals, NAMES[transfer])
    assert np.abs(decode_colours(video, 30) - decode_with_ffmpeg(video, transfer)).max() <= 2


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_tone_mapping_preserves_hue(transfer: str):
    nits = np.array([(100, 20, 20), (1000, 200, 200), (20, 60, 10), (900, 900, 30), (300, 500, 800)], dtype=float)
    light = nits @ np.linalg.inv(TO_BT709).T  # BT.2020 light that converts to these BT.709 values
    if transfer == "pq":
        signals = pq_signal(light)
    else:  # ITU-R BT.2100: display light is 1000 times scene light times its luminance to the power of 0.2
        luminance = light @ (0.2627, 0.678, 0.0593)
        signals = hlg_signal(light / 1000 * ((luminance / 1000) ** (1 / 1.2 - 1))[:, None])
    levels = decode_colours(encode_colours(signals, NAMES[transfer]), len(nits))
    brightest = nits.max(axis=1, keepdims=True) / WHITE_NITS
    expected = to_display_levels(nits / WHITE_NITS * mobius(brightest, PEAKS[transfer]) / brightest)
    assert np.abs(levels - expected).max() <= 3


def test_wide_gamut_sdr_returns_to_bt709():
    """BT.709 colours that were encoded in BT.2020 or Display P3 keep hue and brightness."""
    expected = np.random.default_rng(1).uniform(0.2, 1, (30, 3))
    light = expected**2.4 @ np.linalg.inv(TO_BT709).T
    sampled = decode_colours(encode_colours(light ** (1 / 2.4), NAMES["sdr"]), 30)
    assert np.abs(sampled - 255 * expected).max() <= 3
    p3 = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])  # Display P3
    signals = (expected**2.4 @ np.linalg.inv(p3).T) ** (1 / 2.4)
    codes = (signals[:, None] * 255 * 256).round().astype(np.uint16)
    assert np.abs(to_bt709(codes, ColorTrc.BT709, ColorPrimaries.SMPTE432)[:, 0] - 255 * expected).max() <= 1


def test_hdr_without_primaries_counts_as_bt2020():
    signals = pq_signal(np.random.default_rng(2).uniform(1, 300, (10, 3)))
    tagged = decode_colours(encode_colours(signals, NAMES["pq"]), 10)
    assert np.array_equal(decode_colours(encode_colours(signals, NAMES["pq"], tags=""), 10), tagged)


@pytest.mark.parametrize("matrix", ["bt2020c", "chroma-derived-nc", "ictcp", "YCgCo"])
def test_unsupported_matrices_are_replaced_or_rejected(matrix: str):
    """A matrix close to a supported one is replaced by it. Others are rejected with their number, not as damaged."""
    signals = pq_signal(np.random.default_rng(3).uniform(1, 300, (3, 3)))
    video = encode_colours(signals, NAMES["pq"], tags=f"colorprim=bt2020:colormatrix={matrix}")
    if matrix in ("bt2020c", "chroma-derived-nc"):
        assert np.array_equal(decode(video, 3).clip, decode(encode_colours(signals, NAMES["pq"]), 3).clip)
    else:
        with pytest.raises(RejectedVideo, match=r"no_decoder: its colour matrix \d+ \(ITU-T H\.273\) is not supported"):
            decode(video, 3)


def test_hdr_is_averaged_in_encoded_values():
    """As in SDR. In linear light, a few highlights would dominate the average."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        options = {"qp": "0", "preset": "ultrafast", "x264-params": f"{BT2020}:transfer={NAMES['pq']}"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p10le"
        for number in range(3):
            frame = av.VideoFrame(32, 32, "yuv420p10le")
            for plane, levels in zip(frame.planes, ((200, 600), (512, 512), (512, 512)), strict=True):
                codes = np.tile(np.array(levels, np.uint16), plane.buffer_size // 4)
                plane.update(codes.tobytes())
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    flat = decode_colours(encode_colours(to_grey(np.full(3, (400 - 64) / 876)), NAMES["pq"]), 3)
    assert np.abs(decode(out.getvalue(), 3).clip.astype(float) - flat[0, 0]).max() <= 1


def test_hdr_videos_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    clip = ClipConfig(frames=3, fps=10, height=8, width=8)
    bright = encode_colours(to_grey(pq_signal(np.array([10, 100, 203]))), NAMES["pq"])
    with Sandbox(clip, LimitsConfig()) as sandbox:
        samples = [sandbox.sample(video) for video in (bright, grey_video(9, 30))]
    assert [sampled.source.hdr for sampled in samples] == [True, False]
    rows = [shards._describe_clip(sampled, shards.DecodeConfig(clip)) for sampled in samples]
    assert [row["hdr"] for row in rows] == [True, False]
    assert shards.ROW_SCHEMA.field("hdr")
    metadata = pa.table({"hdr": [row["hdr"] for row in rows]})
    dataset = type("FakeDataset", (), {"metadata": metadata, "__len__": lambda self: 2})()
    _print_hdr_count(dataset)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "1 of 2 clips are from HDR videos, tone-mapped to SDR\n"
