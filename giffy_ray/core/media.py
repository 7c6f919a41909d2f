"""Renders clips for viewing: animations, contact sheets and sprites. Takes clips, returns bytes, writes no files."""

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

AnimationFormat = Literal["gif", "webp", "mp4"]
BACKGROUND_RGB = (250, 250, 248)
TEXT_RGB = (32, 34, 38)
MUTED_RGB = (120, 124, 130)
_HEADING_PX, _GAP_PX, _MARGIN_PX = 14, 3, 14
_FONT_PX, _LINE_PX = 13, 18
_COLUMNS = 8
_FRAME_PX, _MIN_FRAME_PX = 128, 64
_MAX_ROWS_PX = 960  # about the height of a screen: many rows are shown smaller so that they fit on it
_LAST_FRAME_S = 0.7  # extra time of the last frame, so that the viewer sees the end before the loop restarts


def render_animation(rows: Mapping[str, np.ndarray], fps: float, file_format: AnimationFormat) -> bytes:
    """Renders clips side by side as one animation, with a labelled row for each method.

    Args:
        rows: Label -> uint8 [clips, time, height, width, 3], all of the same shape.
        fps: Frame rate.
        file_format: GIF and WebP play in a loop.
    """
    clips, time, clip_height, clip_width, _ = next(iter(rows.values())).shape
    height, width = _display_size(clip_height, clip_width, len(rows))
    left = _label_width(rows)
    canvas_width = left + clips * (width + _GAP_PX) - _GAP_PX + _MARGIN_PX
    canvas_height = 2 * _MARGIN_PX + len(rows) * (height + _GAP_PX) - _GAP_PX
    blank = Image.new("RGB", (canvas_width, canvas_height), BACKGROUND_RGB)
    for row, label in enumerate(rows):
        _draw_label(blank, label, _MARGIN_PX + row * (height + _GAP_PX) + height // 2)
    frames = []
    for index in range(time):
        frame = blank.copy()
        for row, row_clips in enumerate(rows.values()):
            for column in range(clips):
                position = (left + column * (width + _GAP_PX), _MARGIN_PX + row * (height + _GAP_PX))
                frame.paste(_resize(row_clips[column, index], width, height), position)
        frames.append(frame)
    return _encode_animation(frames, fps, file_format)


def render_contact_sheet(
    samples: Sequence[tuple[str, Mapping[str, np.ndarray]]], fps: float, header: Sequence[str] = ()
) -> bytes:
    """Renders a PNG with a block for each sample, a row for each clip and a column for each of eight frames.

    The first and last column show the first and last frame of a clip.

    Args:
        samples: (title, {label: uint8 [time, height, width, 3]}), all clips of the same shape. The second line of a
            label is muted.
        fps: Frame rate, for the times above the columns.
        header: Lines above all blocks; all but the first are muted.
    """
    time, clip_height, clip_width, _ = next(iter(samples[0][1].values())).shape
    height, width = _display_size(clip_height, clip_width, max(len(clips) for _, clips in samples))
    frame_indices = np.linspace(0, time - 1, _COLUMNS).round().astype(int)
    left = _label_width(label for _, clips in samples for label in clips)
    title_px = 2 * _HEADING_PX
    header_px = len(header) * _LINE_PX + _MARGIN_PX if header else 0
    block_heights = [title_px + len(clips) * (height + _GAP_PX) + _HEADING_PX for _, clips in samples]
    block_widths = [_COLUMNS * (width + _GAP_PX) - _GAP_PX, *(_font().getlength(title) for title, _ in samples)]
    right_edges = [left + max(block_widths), *(_MARGIN_PX + _font().getlength(line) for line in header)]
    sheet_size = (round(max(right_edges)) + _MARGIN_PX, header_px + 2 * _HEADING_PX + sum(block_heights))
    sheet = Image.new("RGB", sheet_size, BACKGROUND_RGB)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(header):
        colour = MUTED_RGB if number else TEXT_RGB
        draw.text((_MARGIN_PX, _MARGIN_PX + number * _LINE_PX), line, colour, _font(), anchor="lt")
    for column, index in enumerate(frame_indices):
        centre = left + column * (width + _GAP_PX) + width // 2
        draw.text((centre, header_px + _HEADING_PX), f"{index / fps:.1f} s", MUTED_RGB, _font(), anchor="mm")
    top = header_px + 2 * _HEADING_PX
    for (title, clips), block_height in zip(samples, block_heights, strict=True):
        draw.text((left, top + title_px // 2), title, TEXT_RGB, _font(), anchor="lm")
        for row, (label, clip) in enumerate(clips.items()):
            y = top + title_px + row * (height + _GAP_PX)
            _draw_label(sheet, label, y + height // 2)
            for column, index in enumerate(frame_indices):
                sheet.paste(_resize(clip[index], width, height), (left + column * (width + _GAP_PX), y))
        top += block_height
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def encode_sprite(clip: np.ndarray) -> bytes:
    """Encodes all frames of a clip as one WebP image, for HTML pages that play several clips in step.

    Lossy (quality 80): for viewing, not for measurements.

    Args:
        clip: uint8 [time, height, width, 3]. Frames fill rows of `sprite_columns(time)` from the top left.
    """
    time, height, width, _ = clip.shape
    columns = sprite_columns(time)
    rows = -(-time // columns)
    padding = np.zeros((columns * rows - time, height, width, 3), np.uint8)
    grid = np.concatenate([clip, padding]).reshape(rows, columns, height, width, 3)
    sprite = grid.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    out = io.BytesIO()
    Image.fromarray(sprite).save(out, "WEBP", quality=80, method=2)
    return out.getvalue()


def sprite_columns(time: int) -> int:
    """Frames per row of a sprite. Nearly square, because WebP images have at most 16,383 pixels per side."""
    return math.ceil(math.sqrt(time))


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """Encodes frames as H.264 with x264's default quality. Deterministic: equal frames give equal bytes.

    Args:
        frames: uint8 [time, height, width, 3] of even height and width.
        fps: Frame rate.
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


def _encode_animation(frames: list[Image.Image], fps: float, file_format: AnimationFormat) -> bytes:
    if file_format == "mp4":
        repeated = [frames[-1]] * round(_LAST_FRAME_S * fps)
        stacked = np.stack([np.asarray(frame) for frame in [*frames, *repeated]])
        # yuv420p subsamples chroma in 2x2 blocks, so sizes must be even.
        padding = [(0, 0), (0, stacked.shape[1] % 2), (0, stacked.shape[2] % 2), (0, 0)]
        return encode_mp4(np.pad(stacked, padding, mode="edge"), fps)
    frame_ms = round(1000 / fps)
    durations_ms = [frame_ms] * (len(frames) - 1) + [frame_ms + round(_LAST_FRAME_S * 1000)]
    out = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": durations_ms, "loop": 0}
    if file_format == "webp":
        frames[0].save(out, "WEBP", quality=80, method=2, **options)
    else:
        # All frames share one palette; with a palette per frame, still areas flicker.
        step = max(1, len(frames) // 6)
        palette_source = np.concatenate([np.asarray(frame) for frame in frames[::step]])
        palette = Image.fromarray(palette_source).quantize(256)
        indexed = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
        options["append_images"] = indexed[1:]
        indexed[0].save(out, "GIF", optimize=False, **options)
    return out.getvalue()


def _display_size(height: int, width: int, rows: int) -> tuple[int, int]:
    """Enlarges small clips to about _FRAME_PX by an integer factor; less if there are many rows."""
    longer_side = max(height, width)
    if rows * _FRAME_PX <= _MAX_ROWS_PX:
        scale = max(1, _FRAME_PX // longer_side)
    else:
        scale = max(1, max(_MIN_FRAME_PX, _MAX_ROWS_PX // rows) / longer_side)
    return round(height * scale), round(width * scale)


def _resize(frame: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Importing matplotlib is slow, so only its path is looked up.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:  # installed for inference only; Pillow's font lacks accented letters
        return ImageFont.load_default(_FONT_PX)
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", _FONT_PX)


def _label_width(labels: Iterable[str]) -> int:
    return round(max(_font().getlength(line) for label in labels for line in label.split("\n"))) + 2 * _MARGIN_PX


def _draw_label(image: Image.Image, label: str, centre_y: int) -> None:
    lines = label.split("\n")
    for number, line in enumerate(lines):
        y = centre_y + round((number - (len(lines) - 1) / 2) * _LINE_PX)
        colour = MUTED_RGB if number else TEXT_RGB
        ImageDraw.Draw(image).text((_MARGIN_PX, y), line, colour, _font(), anchor="lm")
