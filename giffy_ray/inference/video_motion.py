"""Makes frames between two frames of a film, in YCbCr: only the small images that motion is estimated on become RGB.

frames --FrameConverter.to_small_rgb--> small images --FilmMotion--> motion
planes of both frames, motion --FilmRenderer--> planes of the frames between
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av
import torch
from torch import Tensor

from giffy_ray.core.tensor_types import to_pixels
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.pair_motion import PairMotion, scaled_size
from giffy_ray.inference.video_file import FrameConverter
from giffy_ray.models.motion import FrameRenderer, Motion

# Longer side of the images that motion is estimated on: a fifth of the film's, within these limits. With half of what
# single pictures get, 512, a film of 1280x720 takes half the time.
_MIN_MOTION_SIZE, _MAX_MOTION_SIZE = 256, 512
_LUMA_CODES, _CHROMA_CODES = 219, 224  # of limited range


class FilmMotion:
    """Estimates the motion between frames of a film, one pair after the other.

    Args:
        interpolator: Has a network that estimates motion.
        converter: Converts the frames.
        motion_size: Longer side of the images that motion is estimated on; None chooses it by the size of the film.
    """

    def __init__(self, interpolator: Interpolator, converter: FrameConverter, motion_size: int | None):
        self._interpolator = interpolator
        longest = max(converter.height, converter.width)
        self._size = motion_size or min(longest, max(_MIN_MOTION_SIZE, min(longest // 5, _MAX_MOTION_SIZE)))
        self._noise = torch.zeros(1, interpolator.generator.latent, device=interpolator.device)
        self._converter = converter
        self._last: tuple[av.VideoFrame, Tensor] | None = None  # the end of one pair starts the next

    def estimate(self, start: av.VideoFrame, end: av.VideoFrame) -> PairMotion:
        """Estimates the motion from one frame to another."""
        first, last = self._to_small_image(start), self._to_small_image(end)
        self._last = end, last
        return self._interpolator.estimate_motion(first, last, self._noise, self._size)

    def _to_small_image(self, frame: av.VideoFrame) -> Tensor:
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        height, width = scaled_size(frame.height, frame.width, self._size)
        rgb = torch.from_numpy(self._converter.to_small_rgb(frame, height, width)).to(self._interpolator.device)
        return rgb.permute(2, 0, 1)[None].float().div_(255)


class FilmRenderer:
    """Renders frames of a film from their motion.

    Args:
        converter: Knows the colour matrix and range of the frames.
        device: Where to compute.
    """

    def __init__(self, converter: FrameConverter, device: torch.device):
        self._converter, self._device = converter, device
        self._residual_matrix = _residual_matrix(*converter.luma_weights, converter.is_full_range).to(device)
        self._last: tuple[av.VideoFrame, tuple[Tensor, Tensor]] | None = None  # the end of one pair starts the next

    def iter_frames(
        self, start: av.VideoFrame, end: av.VideoFrame, motion: PairMotion, times: Sequence[float]
    ) -> Iterator[av.VideoFrame]:
        """Yields the frames at `times`, from 0 at the start to 1 at the end.

        Raises:
            NonFiniteOutput: The weights of the model have diverged.
        """
        first, last = self._to_planes(start), self._to_planes(end)
        self._last = end, last
        luma, chroma = (FrameRenderer(*planes) for planes in zip(first, last, strict=True))
        for time, motion_at_time in zip(times, motion.iter_motion(times), strict=True):
            flows, visibility, residual = motion_at_time
            residual = torch.einsum("cd,ndhw->nchw", self._residual_matrix, residual)
            rendered = [
                luma.render(Motion(flows, visibility, residual[:, :1]), time),
                chroma.render(Motion(flows, visibility, residual[:, 1:]), time),
            ]
            y, cb_cr = (to_pixels(planes)[0].cpu().numpy() for planes in rendered)
            yield self._converter.from_planes(y[..., 0], cb_cr)

    def _to_planes(self, frame: av.VideoFrame) -> tuple[Tensor, Tensor]:
        """Returns luma, [1, 1, height, width], and chroma, [1, 2, height / 2, width / 2], in 0..1 for codes 0..255."""
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        luma, chroma = (torch.from_numpy(planes).to(self._device) for planes in self._converter.to_planes(frame))
        return luma[None, None].float().div_(255), chroma[None].float().div_(255)


def _residual_matrix(red: float, blue: float, is_full_range: bool) -> Tensor:
    """Returns the matrix, [3, 3], that converts a difference of R'G'B' to one of Y'CbCr.

    Args:
        red: Weight of red in luma.
        blue: Weight of blue in luma.
        is_full_range: Whether the codes of both are 0..255.
    """
    luma = torch.tensor([red, 1 - red - blue, blue])
    blue_difference = (torch.tensor([0.0, 0.0, 1.0]) - luma) / (2 * (1 - blue))
    red_difference = (torch.tensor([1.0, 0.0, 0.0]) - luma) / (2 * (1 - red))
    codes = torch.tensor([255, 255, 255] if is_full_range else [_LUMA_CODES, _CHROMA_CODES, _CHROMA_CODES]) / 255
    return torch.stack([luma, blue_difference, red_difference]) * codes[:, None]
