"""What a training's machine does and what the training takes of the cluster, sampled in a thread.

Names and units are those of MLflow's own monitor (`system/cpu_utilization_percentage`), so its page finds them. That
monitor itself asks the server at each sample, and ends for good when one is not answered.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pynvml

from giffy_ray.storage import join, read_text, write_text

EVERY_S = 10.0  # MLflow's interval
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
        psutil.cpu_percent()  # it tells of the time since it was last asked
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
        used = json.loads(read_text(self._file) or json.dumps(_NOTHING))
        cpus, gpus = self._held
        used["samples"] += 1
        used["cpu_hours"] += cpus * seconds / 3600
        used["gpu_hours"] += gpus * seconds / 3600
        write_text(self._file, json.dumps(used))
        return used


def machine() -> dict[str, float]:
    """CPU since this was last asked for, and memory now, of the whole machine."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": 100 * memory.used / memory.total,
    }


def gpus_here() -> list[Any]:
    """NVML's handles of the machine's GPUs, whoever uses them; none without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]


def of_gpus(gpus: list[Any]) -> dict[str, float]:
    named: dict[str, float] = {}
    for number, gpu in enumerate(gpus):
        memory: Any = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        watts = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        values = {
            "memory_usage_percentage": 100 * memory.used / memory.total,
            "memory_usage_megabytes": memory.used / 1e6,
            "utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "power_usage_watts": watts,
            "power_usage_percentage": 100_000 * watts / pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu),
        }
        named |= {f"system/gpu_{number}_{name}": float(value) for name, value in values.items()}
    return named
