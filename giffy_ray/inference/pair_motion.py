"""Estimates the motion of one pair of images, coarse to fine.

    small images --network--> motion
    larger images, starting from that motion --matching, coarse to fine--> displacement of each pixel
    both --selection, pixel by pixel--> motion of each frame

Matching is precise, the network sees far and knows occlusion. Each place takes the motion under which the images agree,
or none, which is a cross-fade.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from giffy_ray.core.tensor_types import ImageFloats, Noise
from giffy_ray.models.matching import (
    mean_displacement,
    move_to_time,
    refine_displacement,
    resize_displacement,
    select_displacement,
)
from giffy_ray.models.motion import Motion, MotionEstimator

_SIZE_MULTIPLE = 8  # of height and width of the images that the network sees
_HALF_WAY = 0.5  # the time at which images are matched
_NETWORK_SIZE = 128  # longer side of the images that the network sees, if matching continues on larger ones
# Factors of the match errors: no motion is preferred to motion that matches little better, and so is the network's
# motion to that by matching, because errors of either are the more visible.
_FIRST_PENALTIES = (1.0, 1.1)
_FINAL_PENALTIES = (1.0, 1.1, 1.2)


class PairMotion:
    """The motion between two images.

    Args:
        estimator: A trained network.
        start: Start image, [1, 3, height, width], 0..1.
        end: End image, of the same shape.
        noise: [1, latent]; zeros give the mean of the prior.
        motion_size: Longer side of the images on which they are matched.
        matching: Refine the network's motion by matching.
        dtype: Precision of the network.
    """

    @torch.no_grad()
    def __init__(
        self,
        estimator: MotionEstimator,
        start: ImageFloats,
        end: ImageFloats,
        noise: Noise,
        motion_size: int,
        matching: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        self._estimator = estimator
        self._noise = noise
        self._dtype = dtype
        images = torch.cat([start, end])
        self._images = scale(images, motion_size)
        self._small_images = scale(images, min(motion_size, _NETWORK_SIZE)) if matching else self._images
        self._matching = matching
        if matching:
            self._match()

    def _match(self) -> None:
        self._network_half_way = next(self._iter_network_motion([_HALF_WAY]))
        small_network = mean_displacement(self._network_half_way)
        still = torch.zeros_like(small_network)
        initial, _ = select_displacement(self._small_images, [still, small_network], [*_FIRST_PENALTIES])
        matched = refine_displacement(self._images, initial)
        height, width = self._images.shape[2:]
        network = resize_displacement(small_network, height, width)
        candidates = [torch.zeros_like(matched), network, matched]
        self._displacement, selected = select_displacement(self._images, candidates, [*_FINAL_PENALTIES])
        self._is_network = (selected == 1).float()

    @torch.no_grad()
    def iter_motion(self, times: Sequence[float]) -> Iterator[Motion]:
        """Yields the motion of the frame at each of `times`, above 0 and below 1, at the size of the matching."""
        if not self._matching:
            yield from self._iter_network_motion(times)
            return
        others = self._iter_network_motion([time for time in times if time != _HALF_WAY])
        for time in times:
            yield self._combine(self._network_half_way if time == _HALF_WAY else next(others), time)

    def _iter_network_motion(self, times: Sequence[float]) -> Iterator[Motion]:
        """Yields the network's motion at each of `times`, in float32."""
        if not times:
            return
        images = self._small_images
        times_tensor = torch.tensor(times, device=images.device)
        batches = self._estimator.iter_motion(images[:1], images[1:], self._noise, times_tensor)
        while True:
            with torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32):
                batch = next(batches, None)
            if batch is None:
                return
            for fields in zip(*batch, strict=True):
                yield Motion(*(field[None].float() for field in fields))

    def _combine(self, network_motion: Motion, time: float) -> Motion:
        """Takes the network's motion where it was selected, and the displacement elsewhere."""
        height, width = self._images.shape[2:]
        motion = resize_motion(network_motion, height, width)
        fields = torch.cat([self._displacement, self._is_network], dim=1)
        moved = move_to_time(fields, self._displacement, time)
        displacement, is_network = moved[:, :2], moved[:, 2:]
        flows = torch.cat([-displacement, displacement], dim=1)
        return Motion(
            is_network * motion.flows + (1 - is_network) * flows,
            is_network * motion.visibility,
            is_network * motion.residual,
        )


def resize_motion(motion: Motion, height: int, width: int) -> Motion:
    """Resizes a motion to images of another size."""
    fields = torch.cat(motion, dim=1)
    resized = functional.interpolate(fields, (height, width), mode="bilinear")
    pixels = fields.new_tensor([width / fields.shape[3], height / fields.shape[2]] * 2).view(1, -1, 1, 1)
    return Motion(resized[:, :4] * pixels, resized[:, 4:5], resized[:, 5:])


def scale(image: Tensor, longer_side: int) -> Tensor:
    """Scales down with antialiasing so that the longer side is about `longer_side`, in multiples of 8."""
    height, width = scaled_size(image.shape[2], image.shape[3], longer_side)
    return scale_to(image, height, width)


def scaled_size(height: int, width: int, longer_side: int) -> tuple[int, int]:
    """Returns height and width of an image scaled down to a longer side, in multiples of 8."""
    factor = min(1.0, longer_side / max(height, width))
    return _round_size(height * factor), _round_size(width * factor)


def scale_to(image: Tensor, height: int, width: int) -> Tensor:
    """Scales to a size, with antialiasing."""
    return functional.interpolate(image, (height, width), mode="bilinear", antialias=True)


def _round_size(size: float) -> int:
    return max(1, round(size / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE
