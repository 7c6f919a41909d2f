"""What a training's machine does and what the training takes of the cluster, sampled in a thread.

Names and units are those of MLflow's own monitor (`system/cpu_utilization_percentage`), so its page finds them. That
monitor itself asks the server at each sample, and ends for good when one is not answered.
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

EVERY_S = 10.0  # MLflow's interval
_NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_NOTHING = {"samples": 0, "cpu_hours": 0.0, "gpu_hours": 0.0}
_log = logging.getLogger(__name__)


class Sampler:
    """Samples until it is ended, and once more then.

    `log` takes named values and their step, which counts the samples of all starts of the run. `cpus` and `gpus` are
    what the training holds; their hours since its first start are kept in the run's folder, `place`, with each sample.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], place: str, cpus: float, gpus: float):
        self._log, self._file, self._held = log, join(place, "tracking", "used.json"), (cpus, gpus)
        self._ended, self._sample_at_end = threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def end(self, sample: bool = True) -> None:
        """`sample`: once more."""
        self._sample_at_end = sample
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        gpus: list[Any] | None = None
        ended, fails, sampled_s = False, False, time.monotonic()
        machine()  # psutil measures CPU use since the previous call
        while not ended:
            ended = self._ended.wait(EVERY_S)
            if ended and not self._sample_at_end:
                return
            now_s = time.monotonic()
            try:
                gpus = gpus_here() if gpus is None else gpus
                used = self._used(now_s - sampled_s)
                sampled_s = now_s
                hours = {f"cost/{name}": used[name] for name in ("cpu_hours", "gpu_hours")}
                self._log(machine() | of_gpus(gpus) | hours, used["samples"])
            except Exception as failure:  # a full disk, a bucket that is away: no training ends for want of a sample
                if not fails:
                    _log.warning("this machine was not sampled: %r; trying again", failure)
                fails = True
            else:
                fails = False

    def _used(self, seconds: float) -> dict[str, Any]:
        """What the run has used by now; in the file before it is logged, so no step is logged twice."""
        used = _parsed(read_text(self._file, "replace"), self._file)
        cpus, gpus = self._held
        used["samples"] += 1
        used["cpu_hours"] += cpus * seconds / 3600
        used["gpu_hours"] += gpus * seconds / 3600
        write_text(self._file, json.dumps(used))
        return used


def _parsed(text: str | None, known_as: str) -> dict[str, Any]:
    """What the file of an earlier start says; nothing where there is none, or it is damaged."""
    if text is None:
        return dict(_NOTHING)
    try:
        said = json.loads(text)
        return {name: type(nothing)(said[name]) for name, nothing in _NOTHING.items()}
    except (ValueError, KeyError, TypeError) as damage:
        _warn_once(f"{known_as} is damaged ({damage!r}): cost/ counts from here on")
        return dict(_NOTHING)


def machine() -> dict[str, float]:
    """CPU use since the previous call, and memory now, of the whole machine; without what cannot be read."""

    def memory_percentage() -> float:
        memory = psutil.virtual_memory()
        return 100 * memory.used / memory.total

    return _readable(
        {
            "system/cpu_utilization_percentage": psutil.cpu_percent,
            "system/system_memory_usage_megabytes": lambda: psutil.virtual_memory().used / 1e6,
            "system/system_memory_usage_percentage": memory_percentage,
        }
    )


def gpus_here() -> list[Any]:
    """NVML's handles of the machine's GPUs, whoever uses them; none without NVIDIA's driver.

    None stands for a GPU that cannot be asked, so that the others keep their numbers.
    """
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception as failure:  # some of pynvml's are no NVMLError
        if getattr(failure, "value", None) not in _NO_DRIVER:  # as after an update of the driver without a restart
            _warn_once(f"GPUs cannot be sampled: {failure!r}")
        return []
    return [_handle(number) for number in range(count)]


def of_gpus(gpus: Sequence[Any]) -> dict[str, float]:
    """What NVML says of each GPU; without the values that one lacks, as on MIG, vGPU or with unified memory."""
    readers = {}
    for number, gpu in enumerate(gpus):
        if gpu is not None:
            readers |= {f"system/gpu_{number}_{name}": read for name, read in _readers(gpu).items()}
    return _readable(readers)


def _handle(number: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(number)
    except Exception as failure:  # it fell off the bus, or this user has no permission
        _warn_once(f"GPU {number} cannot be sampled: {failure!r}")
        return None


def _readers(gpu: Any) -> Mapping[str, Callable[[], float]]:
    def memory() -> Any:
        return pynvml.nvmlDeviceGetMemoryInfo(gpu)

    def memory_percentage() -> float:
        now = memory()
        return 100 * now.used / now.total

    def utilization() -> Any:
        return pynvml.nvmlDeviceGetUtilizationRates(gpu)

    def power_watts() -> float:
        return pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000

    return {
        "memory_usage_percentage": memory_percentage,
        "memory_usage_megabytes": lambda: memory().used / 1e6,
        "utilization_percentage": lambda: utilization().gpu,
        "power_usage_watts": power_watts,
        "power_usage_percentage": lambda: 100_000 * power_watts() / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
    }


def _readable(readers: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Reads each value by itself: one that cannot be read costs no other."""
    values = {}
    for name, read in readers.items():
        try:
            values[name] = float(read())
        except Exception as failure:  # NotSupported, a power limit of 0 W, a /proc that a container hides
            _warn_once(f"{name} cannot be sampled: {failure!r}")
    return values


@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning once a process, as samples are taken every few seconds."""
    _log.warning("%s", message)
