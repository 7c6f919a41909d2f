"""System metrics of a training's machine, and the CPU and GPU hours it uses, sampled in a thread.

Names and units are those of MLflow's own monitor (`system/cpu_utilization_percentage`), so its page shows them. That
monitor sends each sample to the server itself, and stops for good when one is not accepted.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import pynvml

from giffy_ray.core.storage import join, read_text, write_text

INTERVAL_S = 10.0  # MLflow's interval
_NO_DRIVER_ERRORS = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_NO_USAGE = {"samples": 0, "cpu_hours": 0.0, "gpu_hours": 0.0}
_log = logging.getLogger(__name__)


class SystemMetricsSampler:
    """Samples in a thread until `stop`, which takes a last sample."""

    def __init__(self, log: Callable[[dict[str, float], int], None], run_dir: str, cpus: float, gpus: float):
        """Starts the thread.

        Args:
            log: Receives the metrics and their step, which counts the samples of all starts of the run.
            run_dir: The run's folder, where the usage since the run's first start is stored.
            cpus: CPUs that the training holds.
            gpus: GPUs that it holds.
        """
        self._log = log
        self._usage_path = join(run_dir, "tracking", "used.json")
        self._cpus = cpus
        self._gpus = gpus
        self._stopped = threading.Event()
        self._sample_at_stop = True
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self, sample: bool = True) -> None:
        """Ends the thread, after a last sample unless `sample` is False."""
        self._sample_at_stop = sample
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        gpu_handles: list[Any] | None = None
        stopped = False
        has_failed = False
        last_sample_s = time.monotonic()
        read_machine()  # psutil measures CPU utilization since the previous call
        while not stopped:
            stopped = self._stopped.wait(INTERVAL_S)
            if stopped and not self._sample_at_stop:
                return
            now_s = time.monotonic()
            try:
                gpu_handles = open_gpus() if gpu_handles is None else gpu_handles
                usage = self._add_usage(now_s - last_sample_s)
                last_sample_s = now_s
                hours = {f"cost/{name}": usage[name] for name in ("cpu_hours", "gpu_hours")}
                self._log(read_machine() | read_gpus(gpu_handles) | hours, usage["samples"])
            except Exception as failure:  # a full disk or an unreachable bucket must not end the training
                if not has_failed:
                    _log.warning("could not sample this machine, will retry: %r", failure)
                has_failed = True
            else:
                has_failed = False

    def _add_usage(self, duration_s: float) -> dict[str, Any]:
        """Adds to the stored usage. Writes it before it is logged, so that no step is logged twice."""
        usage = _parse_usage(read_text(self._usage_path, "replace"), self._usage_path)
        usage["samples"] += 1
        usage["cpu_hours"] += self._cpus * duration_s / 3600
        usage["gpu_hours"] += self._gpus * duration_s / 3600
        write_text(self._usage_path, json.dumps(usage))
        return usage


def _parse_usage(text: str | None, path: str) -> dict[str, Any]:
    """Parses the usage that an earlier start stored. Zero if there is none, or if it is damaged."""
    if text is None:
        return dict(_NO_USAGE)
    try:
        fields = json.loads(text)
        return {name: type(zero)(fields[name]) for name, zero in _NO_USAGE.items()}
    except (ValueError, KeyError, TypeError) as damage:
        _warn_once(f"{path} is damaged ({damage!r}): cost/ restarts from zero")
        return dict(_NO_USAGE)


def read_machine() -> dict[str, float]:
    """Reads CPU utilization since the previous call and current memory of the machine; omits unreadable values."""

    def memory_percentage() -> float:
        memory = psutil.virtual_memory()
        return 100 * memory.used / memory.total

    return _read_each(
        {
            "system/cpu_utilization_percentage": psutil.cpu_percent,
            "system/system_memory_usage_megabytes": lambda: psutil.virtual_memory().used / 1e6,
            "system/system_memory_usage_percentage": memory_percentage,
        }
    )


def open_gpus() -> list[Any]:
    """Returns NVML handles of all GPUs of the machine, or an empty list without NVIDIA's driver.

    An entry is None if its GPU fails, so that the others keep their numbers.
    """
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception as failure:  # some errors of pynvml are not NVMLError
        # Warns, for example, after a driver update without a reboot, but not on a machine without GPUs.
        if getattr(failure, "value", None) not in _NO_DRIVER_ERRORS:
            _warn_once(f"cannot sample GPUs: {failure!r}")
        return []
    return [_open_gpu(index) for index in range(count)]


def read_gpus(handles: Sequence[Any]) -> dict[str, float]:
    """Reads each GPU; omits values that it does not support, as on MIG, vGPU or with unified memory."""
    readers = {}
    for index, handle in enumerate(handles):
        if handle is not None:
            readers |= {f"system/gpu_{index}_{name}": read for name, read in _gpu_readers(handle).items()}
    return _read_each(readers)


def _open_gpu(index: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as failure:  # it fell off the bus, or this user has no permission
        _warn_once(f"cannot sample GPU {index}: {failure!r}")
        return None


def _gpu_readers(handle: Any) -> Mapping[str, Callable[[], float]]:
    def memory() -> Any:
        return pynvml.nvmlDeviceGetMemoryInfo(handle)

    def memory_percentage() -> float:
        info = memory()
        return 100 * info.used / info.total

    def utilization() -> Any:
        return pynvml.nvmlDeviceGetUtilizationRates(handle)

    def power_watts() -> float:
        return pynvml.nvmlDeviceGetPowerUsage(handle) / 1000

    return {
        "memory_usage_percentage": memory_percentage,
        "memory_usage_megabytes": lambda: memory().used / 1e6,
        "utilization_percentage": lambda: utilization().gpu,
        "power_usage_watts": power_watts,
        "power_usage_percentage": lambda: 100_000 * power_watts() / pynvml.nvmlDeviceGetEnforcedPowerLimit(handle),
    }


def _read_each(readers: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Reads each value separately, so that a failure loses no other value."""
    values = {}
    for name, read in readers.items():
        try:
            values[name] = float(read())
        except Exception as failure:  # NotSupported, a power limit of 0 W, a /proc that a container hides
            _warn_once(f"{name} cannot be read: {failure!r}")
    return values


@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning once per process, because samples are taken every few seconds."""
    _log.warning("%s", message)
