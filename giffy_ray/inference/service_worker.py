"""What a worker of the service computes: the clips of one request at a time. Imports no torch until it has a model.

Ray Serve creates an `InterpolationWorker` in each of its processes; see `giffy_ray.inference.service`.
"""

from __future__ import annotations

import asyncio
import functools
import io
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from giffy_ray.core.errors import InputError

if TYPE_CHECKING:
    from giffy_ray.inference.interpolator import Interpolator

MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp"}
_PREVIEW_QUALITY = 90  # of WebP frames
_LOADED_MODELS = 2  # the current one, and that of requests that came before a reload


class ModelVersion(NamedTuple):
    """A version of a model.

    Attributes:
        source: What `Interpolator.from_pretrained` loads.
        label: How responses and metrics call it; another label means other weights.
    """

    source: str
    label: str


class Part(NamedTuple):
    """A file of a response."""

    name: str
    media_type: str
    content: bytes


class Options(BaseModel):
    """The options of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frames: Annotated[int, Field(ge=2, description="Length of the clip, both images included.")] = 30
    samples: Annotated[int, Field(ge=1, description="Number of clips; the first is the most probable one.")] = 1
    first_sample: Annotated[int, Field(ge=1, le=1000, description="Number of the first clip, to get one again.")] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Determines all samples but the first.")] = 0
    fps: Annotated[float, Field(gt=0, le=120, allow_inf_nan=False, description="Frames per second.")] = 10.0
    format: Annotated[Literal["mp4", "gif", "webp"], Field(description="Format of the clips.")] = "mp4"
    quality: Annotated[int, Field(ge=0, le=100, description="Quality of mp4 and WebP.")] = 80
    ease: Annotated[
        Literal["linear", "in", "out", "in-out"],
        Field(description="Even motion, or motion that starts slowly, ends slowly, or both."),
    ] = "linear"
    loop: Annotated[bool, Field(description="Return to the start.")] = False
    fit: Annotated[
        Literal["crop", "pad", "stretch"], Field(description="What happens to an end of another shape than the start.")
    ] = "crop"
    size: Annotated[
        int | None, Field(ge=16, le=10_000, description="Longer side of the clip; larger images are scaled down.")
    ] = None
    motion_size: Annotated[
        int | None,
        Field(ge=32, le=1024, description="Longer side of the images that motion is found on; chosen by default."),
    ] = None
    preview: Annotated[
        bool, Field(description="Send each frame as soon as it is made, then the clip, as multipart/mixed.")
    ] = False

    def count_frames(self) -> int:
        """Returns the number of frames of a clip."""
        return 2 * self.frames - 2 if self.loop else self.frames


class Cancelled(Exception):
    """Nobody waits for the clip."""


class InterpolationWorker:
    """Computes requests one after another in a thread, and answers other calls meanwhile.

    Args:
        device: See `Interpolator.from_pretrained`.
        threads: For PyTorch.
    """

    def __init__(self, device: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._device = device
        self._computation = ThreadPoolExecutor(1)
        self._load_lock = threading.Lock()
        self._load_cached = functools.lru_cache(maxsize=_LOADED_MODELS)(self._load)

    async def ping(self) -> None:
        """Answers."""

    async def load(self, model: ModelVersion) -> None:
        """Loads a model, while requests are computed. Raises InputError."""
        await asyncio.to_thread(self._get_interpolator, model)

    async def generate(
        self, model: ModelVersion, start: np.ndarray, end: np.ndarray, options: Options
    ) -> AsyncIterator[Part | InputError]:
        """Yields the files of a response, or the InputError that prevents them; see `write_clips`."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()
        is_cancelled = threading.Event()

        def put(part: Part | BaseException | None) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def compute() -> None:
            try:
                write_clips(self._get_interpolator(model), start, end, options, put, is_cancelled.is_set)
            except BaseException as error:
                put(error)
            else:
                put(None)

        future = self._computation.submit(compute)
        try:
            while (part := await parts.get()) is not None:
                if isinstance(part, BaseException) and not isinstance(part, InputError):
                    raise part
                yield part
        finally:
            is_cancelled.set()
            future.cancel()

    def _get_interpolator(self, model: ModelVersion) -> Interpolator:
        with self._load_lock:
            return self._load_cached(model)

    def _load(self, model: ModelVersion) -> Interpolator:
        from giffy_ray.inference.interpolator import Interpolator

        return Interpolator.from_pretrained(model.source, self._device)


def write_clips(
    interpolator: Interpolator,
    start: np.ndarray,
    end: np.ndarray,
    options: Options,
    put: Callable[[Part], None],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Generates the clips of a request.

    Args:
        interpolator: The model.
        start: uint8 [height, width, 3 or 4].
        end: The same, of any size.
        options: Of the request.
        put: Gets each clip when it is complete, and with `options.preview` each frame before.
        is_cancelled: Asked after each frame.

    Raises:
        InputError: The model cannot generate such clips.
        Cancelled: The request is cancelled.
    """
    from giffy_ray.inference.clip import save_frames
    from giffy_ray.inference.images import match_sizes

    # Ray's arrays are read-only, which PyTorch warns of.
    first, last = match_sizes(np.array(start), np.array(end), options.fit)
    motion_size = options.motion_size or interpolator.choose_motion_size(first, last)

    def watch(frames: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames, 1):
            if is_cancelled():
                raise Cancelled
            if options.preview:
                put(Part(f"{name}/frame-{number:04}.webp", "image/webp", _encode_preview(frame)))
            yield frame

    for sample in range(options.first_sample, options.first_sample + options.samples):
        name = f"sample-{sample}"
        frames = watch(_iter_frames(interpolator, first, last, options, sample - 1, motion_size), name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"clip.{options.format}")
            save_frames(frames, path, options.fps, options.quality)
            put(Part(f"{name}.{options.format}", MEDIA_TYPES[options.format], path.read_bytes()))


def _iter_frames(
    interpolator: Interpolator, start: np.ndarray, end: np.ndarray, options: Options, sample: int, motion_size: int
) -> Iterator[np.ndarray]:
    from giffy_ray.inference.interpolator import frame_times

    if interpolator.fixed_size and options.loop:
        raise InputError("loop: this model only generates clips from the start to the end; use the model between")
    times = frame_times(options.frames, options.ease)
    settings: dict[str, Any] = {"sample": sample, "seed": options.seed, "motion_size": motion_size, "resize": True}
    yield from interpolator.iter_frames(start, end, times, **settings)
    if options.loop and options.frames > 2:
        yield from interpolator.iter_frames(end, start, times[1:-1], **settings)


def _encode_preview(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "WEBP", quality=_PREVIEW_QUALITY, method=0)
    return out.getvalue()
