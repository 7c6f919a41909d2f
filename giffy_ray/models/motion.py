"""Motion between two images, and rendering of frames from it at any resolution.

A frame at time t, from 0 at the start to 1 at the end, is

    (1 - a) warp(start, t flow_start) + a warp(end, (1 - t) flow_end) + 4 t (1 - t) residual,
    a = sigmoid(logit(t) + visibility)

This is the blend of Super SloMo (Jiang et al. 2018, arXiv 1712.00080). Motion may be estimated on smaller images than
those it is applied to: then the frames keep the detail of the original images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.core.tensor_types import ImageFloats, Noise

_MAX_VISIBILITY = 8.0
_LANCZOS_LOBES = 4  # on each side of a sample


class Motion(NamedTuple):
    """What moves between two images, for each of n frames."""

    flows: Tensor
    """[n, 4, height, width]: displacements (x, y) from a pixel of the frame to its place in the start, for the whole
    way, then the same for the end, in pixels of this size."""
    visibility: Tensor
    """[n, 1, height, width]: above 0 where the end shows the pixel better than the start."""
    residual: Tensor
    """[n, 3, height, width]: colour that neither image has, half-way."""


@runtime_checkable
class MotionEstimator(Protocol):
    """A generator that estimates motion, and so works on images of any size."""

    latent: int  # width of the noise

    def iter_motion(self, start: ImageFloats, end: ImageFloats, noise: Noise, times: Tensor) -> Iterator[Motion]:
        """Yields the motion of one pair of images, a batch of frames at a time.

        Args:
            start: Start image, [1, 3, height, width].
            end: End image, of the same shape.
            noise: [1, latent]; zeros give the mean of the prior.
            times: Time of each frame, from 0 at the start to 1 at the end, [frames].
        """
        ...


def blend(start: Tensor, end: Tensor, time: Tensor, motion: Motion) -> Tensor:
    """Renders frames from images of the same size as the motion.

    The weight of the end, sigmoid(logit(t) + visibility), is computed in a form that is exactly 0 and 1 at the ends.

    Args:
        start: Start images, [n, 3, height, width].
        end: End images, of the same shape.
        time: Time of each frame, [n, 1, 1, 1].
        motion: The motion of each frame.
    """
    weight = end_weight(time, motion.visibility)
    # Bicubic, because bilinear sampling blurs: its frames are 7 % less sharp than the target's.
    warped_start = warp(start, time * motion.flows[:, :2], "bicubic")
    warped_end = warp(end, (1 - time) * motion.flows[:, 2:], "bicubic")
    return (1 - weight) * warped_start + weight * warped_end + 4 * time * (1 - time) * motion.residual


def end_weight(time: Tensor, visibility: Tensor) -> Tensor:
    """Returns the weight of the end image in the blend, 0..1."""
    odds = time * visibility.clamp(-_MAX_VISIBILITY, _MAX_VISIBILITY).exp()
    return odds / (1 - time + odds)


def warp(picture: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Backward warping: samples each pixel at the position that its flow points to.

    Positions outside use the nearest edge pixel. A non-finite flow gives NaN.

    Args:
        picture: Images or features, [n, channels, height, width].
        flow: Displacements (x, y) in pixels, [n, 2, height, width].
        mode: Interpolation of `grid_sample`, bilinear or bicubic.
    """
    finite = flow.isfinite().all(1, keepdim=True)
    flow = torch.where(finite, flow, 0.0)  # on a CPU, grid_sample's gradient at NaN segfaults
    grid = _sampling_grid(flow, *flow.shape[2:])
    warped = functional.grid_sample(picture, grid, mode, padding_mode="border", align_corners=True)
    return torch.where(finite, warped, math.nan)


class FrameRenderer:
    """Renders frames of two images from motion that may have been estimated on smaller versions of them.

    Memory beyond the images is bounded by `strip_rows`: the warp works on a few strips at a time. Strips sample from
    the whole image, so they leave no seams.

    Args:
        start: Start image, [1, channels, height, width], 0..1; with a fourth channel, colour is premultiplied by it.
        end: End image of the same shape.
        strip_rows: Rows that are warped at once by each thread.
        oversample: Sample from images of twice the size: bicubic sampling half-way between pixels would blur detail of
            single pixels. Takes four times the memory of both images.
    """

    def __init__(self, start: Tensor, end: Tensor, strip_rows: int = 64, oversample: bool = False):
        self.start, self.end, self.strip_rows = start, end, strip_rows
        self._samples = (insert_half_pixels(start), insert_half_pixels(end)) if oversample else (start, end)

    @torch.no_grad()
    def render(self, motion: Motion, time: float) -> Tensor:
        """Renders the frame at `time`, [1, channels, height, width]; values may leave 0..1.

        Args:
            motion: The motion of one frame.
            time: From 0 at the start to 1 at the end.
        """
        channels, height, width = self.start.shape[1:]
        frame = torch.empty_like(self.start)
        scale = self.start.new_tensor([width, height] * 2) / self.start.new_tensor(motion.flows.shape[:1:-1] * 2)
        rows = self.strip_rows * torch.get_num_threads()
        for top in range(0, height, rows):
            strip = slice(top, min(top + rows, height))
            flows = _resize_rows(motion.flows, height, width, strip) * scale.view(1, -1, 1, 1)
            weight = end_weight(torch.tensor(time), _resize_rows(motion.visibility, height, width, strip))
            blended = (1 - weight) * self._warp_rows(self._samples[0], time * flows[:, :2], strip)
            blended += weight * self._warp_rows(self._samples[1], (1 - time) * flows[:, 2:], strip)
            residual = _resize_rows(motion.residual, height, width, strip)
            blended[:, : min(channels, 3)] += 4 * time * (1 - time) * residual
            frame[:, :, strip] = blended
        return frame

    def _warp_rows(self, samples: Tensor, flow: Tensor, rows: slice) -> Tensor:
        """Samples rows of a frame from the whole image, [1, channels, rows, width].

        On a CPU, grid_sample uses one thread per item of the batch, so the rows are divided into as many items.
        """
        channels, height, width = self.start.shape[1:]
        grid = _sampling_grid(flow, height, width, rows.start)
        items = -(-grid.shape[1] // self.strip_rows)
        padding_rows = items * self.strip_rows - grid.shape[1]
        grid = functional.pad(grid, (0, 0, 0, 0, 0, padding_rows)).view(items, self.strip_rows, width, 2)
        images = samples.expand(items, -1, -1, -1)
        warped = functional.grid_sample(images, grid, "bicubic", padding_mode="border", align_corners=True)
        return warped.transpose(0, 1).reshape(1, channels, -1, width)[:, :, : rows.stop - rows.start]


def _sampling_grid(flow: Tensor, height: int, width: int, first_row: int = 0) -> Tensor:
    """Returns the positions that a flow points to, as `grid_sample` takes them, [n, rows, width, 2].

    Args:
        flow: Displacements (x, y) in pixels of some rows of the picture, [n, 2, rows, width].
        height: Of the picture.
        width: Of the picture.
        first_row: The first of the rows.
    """
    rows = flow.shape[2]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(first_row, first_row + rows, device=flow.device, dtype=flow.dtype).view(-1, 1) + flow[:, 1]
    return torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)


def insert_half_pixels(image: Tensor) -> Tensor:
    """Inserts a sample half-way between all neighbouring pixels, by Lanczos interpolation.

    Args:
        image: [n, channels, height, width].

    Returns:
        [n, channels, 2 height - 1, 2 width - 1]; every second sample of every second row is a pixel of `image`.
    """
    offset = torch.arange(1 - _LANCZOS_LOBES, _LANCZOS_LOBES + 1, dtype=image.dtype, device=image.device) - 0.5
    taps = torch.sinc(offset) * torch.sinc(offset / _LANCZOS_LOBES)
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    count, channels, height, width = image.shape
    samples = image.new_empty(count, channels, 2 * height - 1, 2 * width - 1)
    for channel in range(channels):  # one at a time: intermediate results take several times the memory of one
        field = image[:, channel : channel + 1]
        for _ in range(2):  # along the width, then, transposed, along the height
            padded = functional.pad(field, (_LANCZOS_LOBES - 1, _LANCZOS_LOBES, 0, 0), mode="replicate")
            halves = functional.conv2d(padded, taps)
            field = torch.stack([field, halves], dim=-1).flatten(-2)[..., :-1].transpose(2, 3)
        samples[:, channel] = field[:, 0]
    return samples


def _resize_rows(field: Tensor, height: int, width: int, rows: slice) -> Tensor:
    """Returns rows of `field`, resized bilinearly to [n, channels, height, width]."""
    source_height, _source_width = field.shape[2:]
    position = (torch.arange(rows.start, rows.stop, device=field.device) + 0.5) * (source_height / height) - 0.5
    position = position.clamp(0, source_height - 1)
    upper = position.floor().long().clamp(max=max(source_height - 2, 0))
    fraction = (position - upper).view(-1, 1).to(field.dtype)
    lower = (upper + 1).clamp(max=source_height - 1)
    resized_rows = field[:, :, upper] * (1 - fraction) + field[:, :, lower] * fraction
    return functional.interpolate(resized_rows, size=(resized_rows.shape[2], width), mode="bilinear")
