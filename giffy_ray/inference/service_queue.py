"""The queue of the service: checks uploaded images, waits for a free worker, and knows the version of the model.

A request carries the version of the model that it gets. A reload loads the new version in a worker and then gives it to
new requests; those that wait or run keep theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol, TypeVar

import numpy as np

from giffy_ray.core.errors import InputError
from giffy_ray.core.machine import usable_cores
from giffy_ray.core.packaged import packaged_models, packaged_path
from giffy_ray.core.storage import join, read_text, redact_credentials, resolve_path
from giffy_ray.inference.image_sandbox import ImageSandbox
from giffy_ray.inference.service_guard import RequestError, ServiceLimits, ServiceMetrics
from giffy_ray.inference.service_worker import ModelVersion, Options, Part

RELOAD_INTERVAL_S = 30.0
_REGISTRY_SCHEME = "models:/"
_HEALTH_INTERVAL_S, _HEALTH_TIMEOUT_S = 5.0, 10.0
_logger = logging.getLogger("giffy_ray")

_Result = TypeVar("_Result")


class Backend(Protocol):
    """What computes clips."""

    async def ping(self) -> None:
        """Raises an exception if no worker answers."""

    async def load(self, model: ModelVersion) -> None:
        """Loads a model. Raises InputError."""

    def generate(
        self, model: ModelVersion, start: np.ndarray, end: np.ndarray, options: Options
    ) -> AsyncGenerator[Part, None]:
        """Yields the files of a response. Raises InputError before the first one."""
        ...


class Service:
    """The model, its workers, and the queue in front of them.

    Args:
        backend: Computes the clips.
        model: Address or name of the model.
        limits: The limits.
        parallel: Number of requests that are given to the backend at a time.
        reload_interval_s: How often the registry is asked for the version of an alias.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        limits: ServiceLimits,
        *,
        parallel: int,
        reload_interval_s: float = RELOAD_INTERVAL_S,
    ):
        self.limits, self.metrics = limits, ServiceMetrics()
        self._backend, self._address, self._reload_interval_s = backend, model, reload_interval_s
        self._model: ModelVersion | None = None
        self._reload_lock = asyncio.Lock()
        self._places = asyncio.Semaphore(parallel)
        self._decoders = ThreadPoolExecutor(max(1, min(2, int(usable_cores()))), initializer=self._start_sandbox)
        self._sandboxes: list[ImageSandbox] = []
        self._thread = threading.local()  # of `_decoders`: its sandbox
        self._problem: str | None = None

    @property
    def model(self) -> ModelVersion:
        """The version of the model that new requests get."""
        assert self._model, "the service does not run"
        return self._model

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Loads the model, keeps it up to date during the block, and ends the sandboxes. Raises InputError."""
        await self.reload()
        watches = [asyncio.create_task(self._watch_workers())]
        if self._address.startswith(_REGISTRY_SCHEME) and "@" in self._address:
            watches.append(asyncio.create_task(self._watch_registry()))
        try:
            yield
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)
            for sandbox in self._sandboxes:
                sandbox.close()

    async def reload(self) -> bool:
        """Gives new requests the newest version of the model. Returns whether it is another one.

        Raises:
            InputError: It cannot be found or loaded; requests still get the previous one.
        """
        async with self._reload_lock:
            try:
                newest = await asyncio.to_thread(find_model, self._address)
                if newest == self._model:
                    return False
                await self._backend.load(newest)
            except BaseException:
                self.metrics.reloads.labels("failure").inc()
                raise
            self._model = newest
            self.metrics.reloads.labels("success").inc()
            self.metrics.model.clear()
            self.metrics.model.labels(newest.label).set(1)
            return True

    def check_health(self) -> None:
        """Raises RequestError if the workers do not answer."""
        if self._problem:
            raise RequestError(503, self._problem)

    async def check_image(self, file: BinaryIO, name: str, size: int | None) -> tuple[int, int]:
        """Decodes an uploaded image in the sandbox. Returns the height and width that it will have.

        Raises:
            InputError: It cannot be used.
        """
        return await self._decode(lambda sandbox: sandbox.check(_read_all(file), name, size))

    async def generate(
        self, model: ModelVersion, start: BinaryIO, end: BinaryIO, options: Options
    ) -> AsyncGenerator[Part, None]:
        """Waits for a free place, and yields the files of a response.

        The images are decoded again, because the pixels of all requests in the queue would not fit in memory.

        Raises:
            InputError: An image cannot be used, or the model cannot generate such clips.
        """
        self.metrics.waiting.inc()
        try:
            await self._places.acquire()
        finally:
            self.metrics.waiting.dec()
        try:
            first = await self._decode(lambda sandbox: sandbox.read(_read_all(start), "start", options.size))
            last = await self._decode(lambda sandbox: sandbox.read(_read_all(end), "end", options.size))
            async with contextlib.aclosing(self._backend.generate(model, first, last, options)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._places.release()

    async def _decode(self, decode: Callable[[ImageSandbox], _Result]) -> _Result:
        """Calls a function with the sandbox of a free thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, lambda: decode(self._thread.sandbox))

    def _start_sandbox(self) -> None:
        limits = self.limits
        self._thread.sandbox = ImageSandbox(round(limits.image_megapixels * 1e6), limits.decode_s, limits.decode_mb)
        self._sandboxes.append(self._thread.sandbox)

    async def _watch_workers(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            try:
                await asyncio.wait_for(self._backend.ping(), _HEALTH_TIMEOUT_S)
            except Exception as error:
                if self._problem is None:
                    _logger.warning("the workers do not answer: %r", error)
                self._problem = "the workers do not answer"
            else:
                self._problem = None

    async def _watch_registry(self) -> None:
        while True:
            await asyncio.sleep(self._reload_interval_s)
            try:
                await self.reload()
            except Exception as error:  # the registry may answer again at the next try
                _logger.warning("requests still get %s: %s", self.model.label, redact_credentials(str(error)))


def find_model(address: str) -> ModelVersion:
    """Returns the version that an address means now.

    Args:
        address: Name of a model of the package, path or URI of a checkpoint, `models:/NAME@ALIAS` or `models:/NAME/3`.

    Raises:
        InputError: There is no such alias or address, or the registry does not answer.
    """
    if not address.startswith(_REGISTRY_SCHEME):
        try:
            is_packaged = address in packaged_models()
            location = str(packaged_path("models", address)) if is_packaged else resolve_path(address)
            manifest = read_text(join(location, "manifest.json")) or ""
        except (OSError, ValueError) as error:
            raise InputError(f"model: {address!r} cannot be read: {error}") from error
        return ModelVersion(address, f"{_to_label(address)} {hashlib.sha256(manifest.encode()).hexdigest()[:8]}")
    name, is_alias, alias = address.removeprefix(_REGISTRY_SCHEME).partition("@")
    if not is_alias:
        name, _, number = name.rpartition("/")
        return ModelVersion(address, f"{_to_label(name)} {_to_label(number)}")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise InputError(f"model: set MLFLOW_TRACKING_URI to the MLflow server of {address!r}")
    from giffy_ray.tracking.uploader import create_client

    try:
        version = create_client(uri).get_model_version_by_alias(name, alias).version
    except Exception as error:  # MLflow's, which only giffy_ray.tracking imports
        message = redact_credentials(f"MLflow at {uri} reports: {error}")
        raise InputError(f"model: {address!r} cannot be found; {message}") from error
    return ModelVersion(f"{_REGISTRY_SCHEME}{name}/{version}", f"{_to_label(name)} {version}")


def _to_label(address: str) -> str:
    """Returns the last part of an address in characters that every header may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", address.rstrip("/").rpartition("/")[2])


def _read_all(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()
