"""Interpolates between two pictures of any size with a trained model. Imports neither Ray nor MLflow.

start, end --read_image, match_sizes--> uint8 of one size
smaller versions of both --PairMotion--> motion of each frame
original images, motion --FrameRenderer--> frames as sharp as the originals
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from typing import Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from giffy_ray.config import Experiment
from giffy_ray.core.errors import InputError
from giffy_ray.core.tensor_types import to_pixels
from giffy_ray.inference.clip import Clip
from giffy_ray.inference.images import Fit, ImageInput, flatten_alpha, match_sizes, read_image
from giffy_ray.inference.pair_motion import PairMotion, scale_to
from giffy_ray.inference.pretrained import load_pretrained
from giffy_ray.models.motion import FrameRenderer, MotionEstimator
from giffy_ray.models.sampling import ClipGenerator, noise_from_keys

DEFAULT_MODEL = "between"
DEFAULT_FPS = 10.0
Dtype = Literal["float32", "bfloat16", "float16"]
Ease = Literal["linear", "in", "out", "in-out"]
_MAX_MOTION_SIZE = 1024  # longer side, in pixels


class Interpolator:
    """Generates the frames between two pictures.

    >>> interpolator = Interpolator.from_pretrained("between")
    >>> clip = interpolator("a.jpg", "b.jpg", frames=30)
    >>> clip.save("out.mp4")

    Args:
        generator: A trained model.
        experiment: The experiment it was trained with.
        device: Where it computes.
        dtype: Precision of the network; images are warped in float32.
    """

    def __init__(
        self,
        generator: ClipGenerator,
        experiment: Experiment,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.generator = generator
        self.experiment = experiment
        self.device = device
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls, source: str | PathLike[str] = DEFAULT_MODEL, device: str = "auto", dtype: Dtype = "float32"
    ) -> Interpolator:
        """Loads a trained model.

        Args:
            source: Name of a model that comes with the package (`between`, `between-sharp`); path or URI of a
                checkpoint, or of a folder that `giffy export` wrote; or a registered model, such as
                `models:/giffy_ray@champion`, for which MLflow must be installed.
            device: `cpu`, `cuda`, `mps`, or `auto` for the fastest that there is.
            dtype: Precision of the network, by automatic mixed precision: float32, bfloat16 or float16.

        Raises:
            InputError: There is no such model, device or dtype, or the files are damaged.
        """
        selected = select_device(device)
        if dtype not in get_args(Dtype):
            raise InputError(f"dtype: must be one of {', '.join(get_args(Dtype))} (value {dtype!r})")
        generator, experiment = load_pretrained(fspath(source), selected)
        return cls(generator, experiment, selected, getattr(torch, dtype))

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of the only clips that the model generates, or None if it adapts to the pictures."""
        clip = self.experiment.clip
        return None if isinstance(self.generator, MotionEstimator) else (clip.height, clip.width)

    @overload
    def __call__(
        self,
        start: ImageInput,
        end: ImageInput,
        frames: int = ...,
        samples: Literal[1] = 1,
        *,
        seed: int = ...,
        fps: float = ...,
        motion_size: int | None = ...,
        matching: bool | None = ...,
        fit: Fit = ...,
        resize: bool = ...,
    ) -> Clip: ...

    @overload
    def __call__(
        self,
        start: ImageInput,
        end: ImageInput,
        frames: int = ...,
        samples: int = ...,
        *,
        seed: int = ...,
        fps: float = ...,
        motion_size: int | None = ...,
        matching: bool | None = ...,
        fit: Fit = ...,
        resize: bool = ...,
    ) -> list[Clip]: ...

    def __call__(
        self,
        start: ImageInput,
        end: ImageInput,
        frames: int = 30,
        samples: int = 1,
        *,
        seed: int = 0,
        fps: float = DEFAULT_FPS,
        motion_size: int | None = None,
        matching: bool | None = None,
        fit: Fit = "crop",
        resize: bool = False,
    ) -> Clip | list[Clip]:
        """Generates the clip between two pictures, which are its first and last frame.

        Args:
            start: First frame: a path, PIL image, array or tensor; see `read_image`.
            end: Last frame. It is scaled to the size of the start.
            frames: Length of the clip, both pictures included.
            samples: Number of clips. The first is the most probable one (the mean of the prior), the others are drawn.
            seed: Determines the samples that are drawn.
            fps: Frame rate, for saving.
            motion_size: Longer side of the images that motion is estimated on; None chooses it.
            matching: Refine the network's motion by matching the pictures. None does so where motion is estimated on
                larger images than the network was trained on.
            fit: What happens to an end of another shape: crop, pad or stretch.
            resize: Accept a model of fixed size, by scaling the pictures to it.

        Returns:
            One clip, or a list of several.

        Raises:
            InputError: A picture or an option cannot be used.
        """
        if samples < 1:
            raise InputError(f"samples: must be at least 1 (value {samples})")
        if not fps > 0:
            raise InputError(f"fps: must be above 0 (value {fps:g})")
        first, last = match_sizes(read_image(start, "start"), read_image(end, "end"), fit)
        times = frame_times(frames)
        size = self.choose_motion_size(first, last) if motion_size is None else motion_size
        clips = []
        for sample in range(samples):
            generated = self.iter_frames(
                first, last, times, sample=sample, seed=seed, motion_size=size, matching=matching, resize=resize
            )
            clips.append(Clip(np.stack(list(generated)), fps))
        return clips[0] if samples == 1 else clips

    def iter_frames(
        self,
        start: np.ndarray,
        end: np.ndarray,
        times: Sequence[float],
        *,
        sample: int = 0,
        seed: int = 0,
        motion_size: int | None = None,
        matching: bool | None = None,
        resize: bool = False,
    ) -> Iterator[np.ndarray]:
        """Yields the frames at `times`, one by one, in memory that does not depend on their number.

        Args:
            start: uint8 [height, width, 3 or 4].
            end: The same.
            times: Time of each frame, 0 at the start and 1 at the end. At these the pictures are returned unchanged.
            sample: Which sample: 0 is the most probable clip.
            seed: Determines the others.
            motion_size: See `__call__`.
            matching: See `__call__`.
            resize: See `__call__`.

        Yields:
            uint8 [height, width, 3 or 4].

        Raises:
            InputError: An option cannot be used.
            NonFiniteOutput: The weights of the model have diverged.
        """
        if motion_size is not None and motion_size < 1:
            raise InputError(f"motion_size: must be at least 1 (value {motion_size})")
        noise = self._noise(sample, seed)
        if not isinstance(self.generator, MotionEstimator):
            yield from self._iter_fixed_size(start, end, times, noise, resize)
            return
        size = self.choose_motion_size(start, end) if motion_size is None else motion_size
        first, last = _premultiply(self._to_tensor(start)), _premultiply(self._to_tensor(end))
        pair_motion = self.estimate_motion(first[:, :3], last[:, :3], noise, size, matching)
        motions = pair_motion.iter_motion([time for time in times if 0 < time < 1])
        renderer = FrameRenderer(first, last, oversample=True)
        for time in times:
            if time <= 0 or time >= 1:
                yield start if time <= 0 else end
            else:
                yield _to_image(renderer.render(next(motions), time))

    def estimate_motion(
        self, start: Tensor, end: Tensor, noise: Tensor, motion_size: int, matching: bool | None = None
    ) -> PairMotion:
        """Estimates the motion between two images, with a model that adapts to their size.

        Args:
            start: [1, 3, height, width], 0..1.
            end: The same.
            noise: [1, latent]; zeros give the mean of the prior.
            motion_size: See `__call__`.
            matching: See `__call__`.
        """
        assert isinstance(self.generator, MotionEstimator)
        if matching is None:
            matching = motion_size > max(self.experiment.clip.height, self.experiment.clip.width)
        return PairMotion(self.generator, start, end, noise, motion_size, matching, self.dtype)

    def choose_motion_size(self, start: np.ndarray, end: np.ndarray) -> int:
        """Returns the longer side of the images that motion is estimated on, if none is given.

        Larger ones find smaller motion, and take longer.
        """
        return min(max(*start.shape[:2], *end.shape[:2]), _MAX_MOTION_SIZE)

    def _iter_fixed_size(
        self, start: np.ndarray, end: np.ndarray, times: Sequence[float], noise: Tensor, resize: bool
    ) -> Iterator[np.ndarray]:
        clip = self.experiment.clip
        kind = self.experiment.model.kind
        if not resize and start.shape[:2] != (clip.height, clip.width):
            raise InputError(
                f"this model ({kind}) generates only {clip.width}x{clip.height} pixels, and the pictures have "
                f"{start.shape[1]}x{start.shape[0]}; scale them with resize, or use the model between"
            )
        if len(times) != clip.frames or not np.allclose(times, np.linspace(0, 1, clip.frames)):
            raise InputError(
                f"this model ({kind}) generates only {clip.frames} evenly spaced frames (value {len(times)}); set "
                f"frames to {clip.frames}, or use the model between"
            )
        scaled = [
            _to_image(scale_to(self._to_tensor(flatten_alpha(image)), clip.height, clip.width))
            for image in (start, end)
        ]
        first, last = (torch.from_numpy(image)[None] for image in scaled)
        yield from self.generator.generate(first, last, noise)[0].numpy()

    def _noise(self, sample: int, seed: int) -> Tensor:
        latent = self.generator.latent
        if seed < 0:
            raise InputError(f"seed: must be at least 0 (value {seed})")
        if sample == 0 or latent == 0:
            return torch.zeros(1, latent, device=self.device)
        return noise_from_keys(seed, [sample], latent).to(self.device)

    def _to_tensor(self, image: np.ndarray) -> Tensor:
        """Converts uint8 [height, width, channels] to [1, channels, height, width], 0..1."""
        pixels = torch.tensor(image, device=self.device)  # a copy, because the array may be read-only
        return pixels.permute(2, 0, 1)[None].float().div_(255)


def frame_times(frames: int, ease: Ease = "linear") -> list[float]:
    """Returns the time of each of `frames` frames, from 0 at the start to 1 at the end.

    Args:
        frames: At least 2.
        ease: `linear` is even motion; `in` starts slowly, `out` ends slowly, `in-out` does both (smoothstep).

    Raises:
        InputError: There are fewer than two frames, or there is no such ease.
    """
    if frames < 2:
        raise InputError(f"frames: must be at least 2, the two pictures (value {frames})")
    if ease not in get_args(Ease):
        raise InputError(f"ease: must be one of {', '.join(get_args(Ease))} (value {ease!r})")
    steps = np.linspace(0, 1, frames)
    eased = {"linear": steps, "in": steps**2, "out": 1 - (1 - steps) ** 2, "in-out": steps**2 * (3 - 2 * steps)}
    return eased[ease].tolist()


def select_device(name: str = "auto") -> torch.device:
    """Returns a device by name; `auto` prefers CUDA, then Apple's MPS, then the CPU.

    Raises:
        InputError: This machine or this build of PyTorch does not have it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_available in available.items() if is_available))
    kind, _, index = name.partition(":")
    if not available.get(kind, False) or (index and not index.isdecimal()):
        usable = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise InputError(f"device: {name!r} is not available here; use {usable} or auto")
    return torch.device(name)


def _premultiply(image: Tensor) -> Tensor:
    """Multiplies colour by alpha, if there is one, so that what is transparent has no colour to blend."""
    if image.shape[1] == 3:
        return image
    return torch.cat([image[:, :3] * image[:, 3:], image[:, 3:]], dim=1)


def _to_image(frame: Tensor) -> np.ndarray:
    """Converts [1, channels, height, width] to uint8 [height, width, channels]; undoes `_premultiply`.

    Raises:
        NonFiniteOutput: A value is NaN, because the weights of the model have diverged.
    """
    if frame.shape[1] == 4:
        alpha = frame[:, 3:].clamp(0, 1)
        frame = torch.cat([frame[:, :3].clamp(0, 1) / alpha.clamp(min=1 / 255), alpha], dim=1)
    return to_pixels(frame)[0].cpu().numpy()
