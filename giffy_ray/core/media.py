"""Clips -> pictures that a person can look at: animations and contact sheets. Clips in, bytes out, no files."""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Kind = Literal["gif", "webp", "mp4"]
PAPER, INK, FAINT = (250, 250, 248), (32, 34, 38), (120, 124, 130)
_TEXT_PX, _GAP_PX, _MARGIN_PX = 14, 3, 14
_FONT_PX, _LINE_PX = 13, 18
_COLUMNS = 8
_SHOWN_PX, _SMALL_PX = 128, 64
_BLOCK_PX = 960  # about as high as a screen: many rows are shown smaller, so that they can be compared
_LAST_FRAME_S = 0.7  # the eye needs to see where it ends before it starts again


def animation(rows: Mapping[str, np.ndarray], fps: float, kind: Kind) -> bytes:
    """Clips side by side and moving, a labelled row for each method.

    `rows`: label -> uint8 [clips, time, height, width, 3], all of one shape. Plays at `fps`, GIF and WebP in a loop.
    """
    clips, time, *size = next(iter(rows.values())).shape
    height, width = _shown_size(size[0], size[1], len(rows))
    left = _label_width(rows)
    canvas = (
        left + clips * (width + _GAP_PX) - _GAP_PX + _MARGIN_PX,
        2 * _MARGIN_PX + len(rows) * (height + _GAP_PX) - _GAP_PX,
    )
    blank = Image.new("RGB", canvas, PAPER)
    for row, label in enumerate(rows):
        _label(blank, label, _MARGIN_PX + row * (height + _GAP_PX) + height // 2)
    frames = []
    for moment in range(time):
        frame = blank.copy()
        for row, made in enumerate(rows.values()):
            for column in range(clips):
                place = (left + column * (width + _GAP_PX), _MARGIN_PX + row * (height + _GAP_PX))
                frame.paste(_enlarged(made[column, moment], width, height), place)
        frames.append(frame)
    return _animated(frames, fps, kind)


def contact_sheet(
    samples: Sequence[tuple[str, Mapping[str, np.ndarray]]], fps: float, header: Sequence[str] = ()
) -> bytes:
    """A PNG with a block for each sample, a row for each of its clips and a column for each of eight moments.

    `samples`: (title, {label: uint8 [time, height, width, 3]}), of one shape. First and last column are a clip's first
    and last frame. `header`: lines above it all. A label's second line is faint, as are all but the header's first.
    """
    time, *size = next(iter(samples[0][1].values())).shape
    height, width = _shown_size(size[0], size[1], max(len(clips) for _, clips in samples))
    moments = np.linspace(0, time - 1, _COLUMNS).round().astype(int)
    left, title_px = _label_width(label for _, clips in samples for label in clips), 2 * _TEXT_PX
    header_px = len(header) * _LINE_PX + _MARGIN_PX if header else 0
    block_px = [title_px + len(clips) * (height + _GAP_PX) + _TEXT_PX for _, clips in samples]
    inside = [_COLUMNS * (width + _GAP_PX) - _GAP_PX, *(_font().getlength(title) for title, _ in samples)]
    across = [left + max(inside), *(_MARGIN_PX + _font().getlength(line) for line in header)]
    sheet = Image.new("RGB", (round(max(across)) + _MARGIN_PX, header_px + 2 * _TEXT_PX + sum(block_px)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(header):
        draw.text((_MARGIN_PX, _MARGIN_PX + number * _LINE_PX), line, FAINT if number else INK, _font(), anchor="lt")
    for column, moment in enumerate(moments):
        middle = left + column * (width + _GAP_PX) + width // 2
        draw.text((middle, header_px + _TEXT_PX), f"{moment / fps:.1f} s", FAINT, _font(), anchor="mm")
    top = header_px + 2 * _TEXT_PX
    for (title, clips), down in zip(samples, block_px, strict=True):
        draw.text((left, top + title_px // 2), title, INK, _font(), anchor="lm")
        for row, (label, clip) in enumerate(clips.items()):
            y = top + title_px + row * (height + _GAP_PX)
            _label(sheet, label, y + height // 2)
            for column, moment in enumerate(moments):
                picture = _enlarged(clip[moment], width, height)
                sheet.paste(picture, (left + column * (width + _GAP_PX), y))
        top += down
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def sprite(clip: np.ndarray) -> bytes:
    """All frames of a clip in one WebP picture, `sprite_columns` to a row, for pages that play several in step.

    `clip`: uint8 [time, height, width, 3]. Compressed (quality 80): for looking at, not for measuring.
    """
    time, height, width, _ = clip.shape
    across = sprite_columns(time)
    down = -(-time // across)
    padded = np.concatenate([clip, np.zeros((across * down - time, height, width, 3), np.uint8)])
    picture = padded.reshape(down, across, height, width, 3).swapaxes(1, 2).reshape(down * height, across * width, 3)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "WEBP", quality=80, method=2)
    return out.getvalue()


def sprite_columns(time: int) -> int:
    """As good as square: a WebP picture has at most 16,383 pixels in each direction."""
    return math.ceil(math.sqrt(time))


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [time, height, width, 3], of even height and width -> H.264 at x264's default quality.

    The same frames give the same bytes.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _animated(frames: list[Image.Image], fps: float, kind: Kind) -> bytes:
    if kind == "mp4":
        again = [frames[-1]] * round(_LAST_FRAME_S * fps)
        stacked = np.stack([np.asarray(frame) for frame in [*frames, *again]])
        odd = [(0, 0), *((0, size % 2) for size in stacked.shape[1:3]), (0, 0)]  # H.264's colours are of 2x2 pixels
        return encode_mp4(np.pad(stacked, odd, mode="edge"), fps)
    frame_ms = round(1000 / fps)
    durations_ms = [frame_ms] * (len(frames) - 1) + [frame_ms + round(_LAST_FRAME_S * 1000)]
    out = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": durations_ms, "loop": 0}
    if kind == "webp":
        frames[0].save(out, "WEBP", quality=80, method=2, **options)
    else:
        # One palette for all frames: a palette of each frame's own makes still parts flicker.
        step = max(1, len(frames) // 6)
        palette = Image.fromarray(np.concatenate([np.asarray(f) for f in frames[::step]])).quantize(256)
        indexed = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
        options["append_images"] = indexed[1:]
        indexed[0].save(out, "GIF", optimize=False, **options)
    return out.getvalue()


def _shown_size(height: int, width: int, rows: int) -> tuple[int, int]:
    """Small clips are enlarged to about _SHOWN_PX, by a whole number; less where there are many rows of them."""
    larger = max(height, width)
    few = rows * _SHOWN_PX <= _BLOCK_PX
    scale = max(1, _SHOWN_PX // larger if few else max(_SMALL_PX, _BLOCK_PX // rows) / larger)
    return round(height * scale), round(width * scale)


def _enlarged(frame: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font has no letters with accents. Found without importing matplotlib, which is slow.
    spec = importlib.util.find_spec("matplotlib")
    assert spec and spec.origin
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", _FONT_PX)


def _label_width(labels: Iterable[str]) -> int:
    return round(max(_font().getlength(line) for label in labels for line in label.split("\n"))) + 2 * _MARGIN_PX


def _label(image: Image.Image, label: str, middle: int) -> None:
    lines = label.split("\n")
    for number, line in enumerate(lines):
        y = middle + round((number - (len(lines) - 1) / 2) * _LINE_PX)
        ImageDraw.Draw(image).text((_MARGIN_PX, y), line, FAINT if number else INK, _font(), anchor="lm")
