"""Facts about this machine for `giffy doctor`: libraries, resources, folders and services."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from giffy_ray.core.machine import free_memory_bytes, usable_cores
from giffy_ray.core.packaged import packaged_models
from giffy_ray.core.storage import redact_credentials

_LIBRARIES = ("giffy_ray", "torch", "av", "Pillow", "numpy", "ray", "mlflow", "optuna", "fastapi", "onnxruntime")
_FILTERS = ("minterpolate", "zscale", "tonemap")  # that baselines and comparisons use
_ENCODERS = ("libx264", "libwebp")
_POSIX_MODULES = ("fcntl", "pwd", "resource")  # what the sandbox around video decoding is made of
_TIMEOUT_S = 2.0  # of each service


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory."""

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Folder:
    """A folder that must be writable."""

    purpose: str
    path: str
    free_bytes: int | None
    problem: str | None


@dataclass(frozen=True)
class Service:
    """A server that training uses.

    Attributes:
        address: Without credentials. None if none is configured.
        description: What the address means, or how the service answered.
        problem: Why it cannot be reached.
    """

    address: str | None
    description: str
    problem: str | None = None


@dataclass(frozen=True)
class Facts:
    """Properties of this machine. An unknown value is None."""

    platform: str
    versions: Mapping[str, str | None]  # of Python and libraries; None is not installed
    import_errors: Mapping[str, str]  # of installed libraries that inference needs
    cores: float  # that this process may use
    machine_cores: int
    torch_threads: int | None
    free_memory_bytes: int | None
    shared_memory_bytes: int | None  # free in /dev/shm
    gpus: tuple[Gpu, ...]
    has_mps: bool  # Apple's GPU
    has_nvidia_driver: bool
    ffmpeg: str | None
    filters: Mapping[str, bool]
    encoders: Mapping[str, bool]
    missing_modules: tuple[str, ...]  # of the standard library
    folders: tuple[Folder, ...]
    models: tuple[str, ...]  # that come with the package
    self_test_s: float | None  # duration of an interpolation of two small images
    self_test_error: str | None
    ray: Service
    mlflow: Service


def collect_facts(environment: Mapping[str, str]) -> Facts:
    """Looks at this machine. Takes some seconds, mostly for importing torch.

    Args:
        environment: Environment variables.
    """
    import_errors = {name: problem for name in ("torch", "av", "PIL") if (problem := _find_import_problem(name))}
    torch_facts = {} if "torch" in import_errors else _inspect_torch()
    ffmpeg_facts = {} if "av" in import_errors else _inspect_ffmpeg()
    models = tuple(packaged_models())
    self_test_s, self_test_error = (None, None) if import_errors or not models else _test_interpolation()
    return Facts(
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        versions={"Python": platform.python_version(), **{name: _find_version(name) for name in _LIBRARIES}},
        import_errors=import_errors,
        cores=usable_cores(),
        machine_cores=os.cpu_count() or 1,
        torch_threads=torch_facts.get("threads"),
        free_memory_bytes=free_memory_bytes(),
        shared_memory_bytes=_free_bytes("/dev/shm"),
        gpus=torch_facts.get("gpus", ()),
        has_mps=torch_facts.get("has_mps", False),
        has_nvidia_driver=shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists(),
        ffmpeg=ffmpeg_facts.get("version"),
        filters=ffmpeg_facts.get("filters", {}),
        encoders=ffmpeg_facts.get("encoders", {}),
        missing_modules=tuple(name for name in _POSIX_MODULES if importlib.util.find_spec(name) is None),
        folders=tuple(_inspect_folders()),
        models=models,
        self_test_s=self_test_s,
        self_test_error=self_test_error,
        ray=find_ray(environment),
        mlflow=find_mlflow(environment),
    )


def find_ray(environment: Mapping[str, str]) -> Service:
    """Looks where Ray is configured to run, and whether something answers there."""
    address = environment.get("RAY_ADDRESS", "")
    if address == "local":
        return Service(None, "RAY_ADDRESS=local: jobs start Ray on this machine")
    origin = "RAY_ADDRESS"
    if address in ("", "auto"):
        # `ray start` writes the address of its cluster there.
        current = Path(environment.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
        origin = str(current)
        running = _read_line(current)
        if running is None:
            problem = "no cluster runs on this machine" if address == "auto" else None
            return Service(address or None, "not set: jobs start Ray on this machine", problem)
        address = running
    if address.startswith(("http://", "https://")):
        problem = _request(f"{address.rstrip('/')}/api/version")
    else:
        problem = _connect(address.removeprefix("ray://"))
    return Service(redact_credentials(address), f"from {origin}", problem)


def find_mlflow(environment: Mapping[str, str]) -> Service:
    """Looks which MLflow server or database is configured, and whether it answers."""
    address = environment.get("MLFLOW_TRACKING_URI", "")
    if not address:
        return Service(None, "not set: runs go to mlflow.db in their storage")
    shown = redact_credentials(address)
    if address.startswith(("http://", "https://")):
        return Service(shown, "server", _request(f"{address.rstrip('/')}/health"))
    return Service(shown, "database, not checked")


def _request(url: str) -> str | None:
    """Returns why a server does not answer, or None if it does. An answer may be that it wants a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
        with urllib.request.urlopen(parts._replace(netloc=host).geturl(), timeout=_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}" if error.code >= http.client.INTERNAL_SERVER_ERROR else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error)


def _connect(address: str) -> str | None:
    """Returns why nothing accepts connections at HOST:PORT, or None if something does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return "it is not HOST:PORT"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def _read_line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _find_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a library may raise anything on a machine that it does not support
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _inspect_torch() -> dict:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), free_bytes, total_bytes))
    return {
        "threads": torch.get_num_threads(),
        "gpus": tuple(gpus),
        "has_mps": torch.backends.mps.is_available(),
    }


def _inspect_ffmpeg() -> dict:
    import av
    from av.codec import codecs_available
    from av.filter import filters_available

    return {
        "version": av.ffmpeg_version_info,
        "filters": {name: name in filters_available for name in _FILTERS},
        "encoders": {name: name in codecs_available for name in _ENCODERS},
    }


def _inspect_folders() -> Iterator[Folder]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for purpose, path in (("temporary", Path(tempfile.gettempdir())), ("cache", cache), ("current", Path.cwd())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        yield Folder(purpose, str(path), _free_bytes(existing), _find_write_problem(existing))


def _find_write_problem(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"writable")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _free_bytes(path: str | Path) -> int | None:
    with suppress(OSError):
        return shutil.disk_usage(path).free
    return None


def _test_interpolation() -> tuple[float | None, str | None]:
    """Writes a clip between two small images. Returns how long that took, or why it failed."""
    import numpy as np

    from giffy_ray.inference.interpolator import Interpolator

    start, end = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    start_s = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            Interpolator.from_pretrained()(start, end, frames=3).save(Path(folder, "clip.mp4"))
    except Exception as error:  # whatever it is, it is reported
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]
    return round(time.perf_counter() - start_s, 3), None
