"""Refines motion between two images, coarse to fine, by matching them.

A network estimates motion on small images, and only as precisely as it has learned to. `refine_displacement` continues
on larger images: at each level of a pyramid it warps both images to the moment half-way and moves every pixel so that
they agree, by the least-squares step of Lucas & Kanade (1981), in both images at once, over a Gaussian window.

A displacement is how far the content of each pixel of the frame half-way moves from start to end: (x, y) in pixels,
[1, 2, height, width].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.models.motion import Motion, warp

_COARSEST_SIZE = 16  # shorter side of the coarsest level
_ITERATIONS = 4  # per level
_WINDOW_STD_PX = 2.5  # of the window, in pixels of each level
_MAX_STEP_PX = 1.0  # of one iteration: further away, the image is not the plane that a step assumes
_DAMPING = 1e-4  # of the least squares, in squared gradient; keeps the displacement where there is no texture


def refine_displacement(images: Tensor, initial: Tensor) -> Tensor:
    """Refines how far each pixel of the frame half-way moves from start to end.

    Args:
        images: Start and end, [2, channels, height, width], 0..1.
        initial: First estimate, (x, y) in pixels, [1, 2, height, width].

    Returns:
        [1, 2, height, width].
    """
    height, width = images.shape[2:]
    levels = 0
    while min(height, width) >> (levels + 1) >= _COARSEST_SIZE:
        levels += 1
    displacement = initial
    for level in range(levels, -1, -1):
        size = (max(1, height >> level), max(1, width >> level))
        level_images = functional.interpolate(images, size, mode="area") if level else images
        displacement = resize_displacement(displacement, *size)
        for _ in range(_ITERATIONS):
            displacement = displacement + _lucas_kanade_step(level_images, displacement)
    return displacement


def match_error(images: Tensor, displacement: Tensor) -> Tensor:
    """Returns by how much the two images differ around each pixel, warped to the moment half-way.

    Args:
        images: Start and end, [2, channels, height, width].
        displacement: [1, 2, height, width].

    Returns:
        Mean absolute difference over a Gaussian window, [1, 1, height, width].
    """
    warped_start, warped_end = warp_half_way(images, displacement).split(1)
    return blur((warped_end - warped_start).abs().mean(1, keepdim=True), _WINDOW_STD_PX)


def resize_displacement(displacement: Tensor, height: int, width: int) -> Tensor:
    """Resizes a field of displacements to images of another size."""
    scale = displacement.new_tensor([width / displacement.shape[3], height / displacement.shape[2]])
    return functional.interpolate(displacement, (height, width), mode="bilinear") * scale.view(1, 2, 1, 1)


def select_displacement(images: Tensor, candidates: list[Tensor], penalties: list[float]) -> tuple[Tensor, Tensor]:
    """Selects for each pixel the candidate with the smallest match error times its penalty.

    Args:
        images: Start and end, [2, channels, height, width].
        candidates: Displacements.
        penalties: One for each candidate.

    Returns:
        The selected displacement, and the index of the selected candidate, int64 [1, 1, height, width].
    """
    errors = [penalty * match_error(images, field) for field, penalty in zip(candidates, penalties, strict=True)]
    index = torch.cat(errors, dim=1).argmin(1, keepdim=True)
    stacked = torch.stack(candidates)
    selected = stacked.gather(0, index[None].expand(-1, -1, 2, -1, -1))[0]
    return selected, index


def mean_displacement(motion: Motion) -> Tensor:
    """Returns the displacement of a motion, as the mean of both of its flows."""
    return (motion.flows[:, 2:] - motion.flows[:, :2]) / 2


def move_to_time(field: Tensor, displacement: Tensor, time: float) -> Tensor:
    """Moves a field of the frame half-way along the displacement, to the frame at `time`.

    Args:
        field: [1, channels, height, width].
        displacement: Of the frame half-way.
        time: From 0 at the start to 1 at the end.
    """
    displacement_at_time = displacement
    for _ in range(2):  # the displacement at the place where each pixel of the frame is half-way
        displacement_at_time = warp(displacement, (0.5 - time) * displacement_at_time)
    return warp(field, (0.5 - time) * displacement_at_time)


def blur(field: Tensor, std_px: float) -> Tensor:
    """Gaussian blur; edges are extended."""
    radius = max(1, round(2 * std_px))
    position = torch.arange(-radius, radius + 1, dtype=field.dtype, device=field.device)
    kernel = (-0.5 * (position / std_px) ** 2).exp()
    kernel = kernel / kernel.sum()
    channels = field.shape[1]
    weight = kernel.view(1, 1, -1).expand(channels, -1, -1)
    padded = functional.pad(field, [radius] * 4, mode="replicate")
    rows = functional.conv2d(padded, weight[:, :, :, None], groups=channels)
    return functional.conv2d(rows, weight[:, :, None], groups=channels)


def _lucas_kanade_step(images: Tensor, displacement: Tensor) -> Tensor:
    """Returns the change of the displacement that makes both images agree, to first order.

    With d the displacement, start(p - d/2) and end(p + d/2) should be equal. The derivative of their difference by d is
    the mean of both gradients.

    Args:
        images: Start and end, [2, channels, height, width].
        displacement: [1, 2, height, width].
    """
    warped_start, warped_end = warp_half_way(images, displacement).split(1)
    difference = warped_end - warped_start
    difference = difference - blur(difference, 3 * _WINDOW_STD_PX)  # a change of brightness is no motion
    gradient_x, gradient_y = _gradient(0.5 * (warped_start + warped_end))
    products = [
        gradient_x * gradient_x,
        gradient_x * gradient_y,
        gradient_y * gradient_y,
        gradient_x * difference,
        gradient_y * difference,
    ]
    sums = blur(torch.cat([product.sum(1, keepdim=True) for product in products], dim=1), _WINDOW_STD_PX)
    xx, xy, yy, x_difference, y_difference = sums.unbind(1)
    xx, yy = xx + _DAMPING, yy + _DAMPING
    determinant = xx * yy - xy * xy
    step_x = (xy * y_difference - yy * x_difference) / determinant
    step_y = (xy * x_difference - xx * y_difference) / determinant
    return torch.stack([step_x, step_y], dim=1).clamp(-_MAX_STEP_PX, _MAX_STEP_PX)


def warp_half_way(images: Tensor, displacement: Tensor) -> Tensor:
    """Warps start and end, [2, channels, height, width], to the moment half-way."""
    return warp(images, torch.cat([-0.5 * displacement, 0.5 * displacement]))


def _gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences, [n, channels, height, width] each."""
    padded = functional.pad(image, [1] * 4, mode="replicate")
    return (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2, (
        padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    ) / 2
