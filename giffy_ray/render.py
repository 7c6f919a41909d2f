"""Clips -> pictures that a person can look at: animations and contact sheets. Clips in, bytes out, no files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT = (250, 250, 248), (32, 34, 38), (120, 124, 130)
_TEXT_PX, _GAP_PX, _MARGIN_PX = 14, 3, 14
_COLUMNS = 8
_SHOWN_PX = 128
_LAST_FRAME_S = 0.7  # the eye needs to see where it ends before it starts again


def animation(rows: Mapping[str, np.ndarray], fps: float, kind: Literal["gif", "webp"]) -> bytes:
    """Clips side by side and moving, a labelled row for each method.

    `rows`: label -> uint8 [clips, time, height, width, 3], all of one shape. Plays in a loop at `fps`.
    """
    clips, time, *size = next(iter(rows.values())).shape
    height, width = _shown_size(*size[:2])
    left = _label_width(rows)
    canvas = (
        left + clips * (width + _GAP_PX) - _GAP_PX + _MARGIN_PX,
        2 * _MARGIN_PX + len(rows) * (height + _GAP_PX) - _GAP_PX,
    )
    blank = Image.new("RGB", canvas, _PAPER)
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


def contact_sheet(samples: Sequence[tuple[str, Mapping[str, np.ndarray]]], fps: float) -> bytes:
    """A PNG with a block for each sample, a row for each method and a column for each of eight moments.

    `samples`: (title, {label: uint8 [time, height, width, 3]}). First and last column are the given images.
    """
    labels = list(samples[0][1])
    time, *size = samples[0][1][labels[0]].shape
    height, width = _shown_size(*size[:2])
    moments = np.linspace(0, time - 1, _COLUMNS).round().astype(int)
    left, title_px = _label_width(labels), 2 * _TEXT_PX
    block_px = title_px + len(labels) * (height + _GAP_PX) + _TEXT_PX
    sheet = Image.new(
        "RGB",
        (left + _COLUMNS * (width + _GAP_PX) - _GAP_PX + _MARGIN_PX, 2 * _TEXT_PX + len(samples) * block_px),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, moment in enumerate(moments):
        middle = left + column * (width + _GAP_PX) + width // 2
        draw.text((middle, _TEXT_PX), f"{moment / fps:.1f} s", _FAINT, _font(), anchor="mm")
    for block, (title, clips) in enumerate(samples):
        top = 2 * _TEXT_PX + block * block_px
        draw.text((left, top + title_px // 2), title, _INK, _font(), anchor="lm")
        for row, label in enumerate(labels):
            y = top + title_px + row * (height + _GAP_PX)
            _label(sheet, label, y + height // 2)
            for column, moment in enumerate(moments):
                picture = _enlarged(clips[label][moment], width, height)
                sheet.paste(picture, (left + column * (width + _GAP_PX), y))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _animated(frames: list[Image.Image], fps: float, kind: Literal["gif", "webp"]) -> bytes:
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


def _shown_size(height: int, width: int) -> tuple[int, int]:
    """Small clips are enlarged, by a whole number, to about _SHOWN_PX."""
    scale = max(1, _SHOWN_PX // max(height, width))
    return height * scale, width * scale


def _enlarged(frame: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT_PX)


def _label_width(labels: Mapping[str, object] | Sequence[str]) -> int:
    return round(max(_font().getlength(label) for label in labels)) + 2 * _MARGIN_PX


def _label(image: Image.Image, label: str, middle: int) -> None:
    ImageDraw.Draw(image).text((_MARGIN_PX, middle), label, _INK, _font(), anchor="lm")
