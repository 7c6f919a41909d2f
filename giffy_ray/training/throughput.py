"""What a training step costs: losses and times by epoch, operations counted, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from giffy_ray.core import distributed
from giffy_ray.core.async_copy import AsyncHostCopy

# Dense bfloat16 products (float16 where there is no bfloat16) in 10^12 operations a second, from the makers' data
# sheets, by words of the name that NVML and torch give a device. The first entry whose words are all there counts.
_PEAK_TFLOPS = {
    **{"H100 PCIe": 756, "H100 HBM2e": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989},
    **{"H800 PCIe": 756, "H800": 989, "H20": 148, "B200": 2250, "GB200": 2500},
    **{"A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10": 125, "A10G": 70},
    **{"L40S": 362, "L40": 181, "L4": 121, "V100 PCIE": 112, "V100 FHHL": 105, "V100S": 130, "V100": 125, "T4": 65},
}
# A slice of a GPU: an instance of MIG, or a profile of vGPU (A10-24Q, A100-1-5CME), which has a part of its peak.
_SLICE = re.compile(r"MIG|GRID|\d+[ABCQ](ME)?")
_TRACED = schedule(wait=5, warmup=2, active=5, repeat=1)  # steps


class ThroughputMonitor:
    """Losses and times since they were last asked for. `sums`, over all workers, go into a checkpoint and come back."""

    def __init__(self, sums: Mapping[str, float], batch: int, device: torch.device, skipped: int = 0):
        """`skipped`: the steps that were skipped before, which count towards the limit of the whole run."""
        self.batch, self.device = batch, device
        self.skipped, self.last_skipped = skipped, -1  # how many steps, and which was the last since the start
        self._unseen: tuple[int, AsyncHostCopy] | None = None
        self.flops: int | None = None  # of a step of this worker
        self._sums, self._losses = dict(sums), list[tuple[Mapping[str, Tensor], float]]()
        _reset_peaks(device)  # a search trains one trial after another in the same process
        self.reset()

    def reset(self) -> None:
        """The clock: what comes before a step, such as a validation, is not the time of a step."""
        self._waited_s, self._steps, self._began_s = 0.0, 0, time.perf_counter()

    @contextmanager
    def count_flops_once(self) -> Iterator[None]:
        """Inside is a step; of the first one the floating-point operations of products and convolutions are counted."""
        if self.flops is not None:
            yield
            return
        # What is compiled cannot be counted: this step is not.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def add_data_wait(self, seconds: float) -> None:
        self._waited_s += seconds

    def add(self, step: int, losses: Mapping[str, Tensor], clips: int) -> None:
        """What a step of this worker's `clips` returned: means over them.

        Whether it was skipped is looked at after the next one, which a GPU has been told of by then, and works on.
        """
        self._losses.append((losses, clips / self.batch))
        self._steps += 1
        self._look()
        self._unseen = step, AsyncHostCopy(losses["skipped"])

    def _look(self) -> None:
        if self._unseen and any(self._unseen[1].wait()):
            self.skipped, self.last_skipped = self.skipped + 1, self._unseen[0]
        self._unseen = None

    def sums(self) -> dict[str, float]:
        """Of each loss over the steps, as means over whole batches; 'name steps' counts those that had it.

        The losses of a skipped step, which may be NaN, do not count.
        """
        self._look()
        here: dict[str, list[Tensor]] = {}
        counts: dict[str, list[Tensor]] = {}
        for losses, share in self._losses:
            taken = losses["skipped"] == 0
            for name, loss in losses.items():
                counted = torch.ones_like(taken) if name == "skipped" else taken
                here.setdefault(name, []).append(torch.where(counted, share * loss.double(), 0.0))
                counts.setdefault(name, []).append(counted)
        names = sorted(here)
        totals = distributed.all_reduce_sum([float(torch.stack(here[name]).sum()) for name in names], self.device)
        for name, total in zip(names, totals, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total
            steps = self._sums.get(f"{name} steps", 0.0)
            self._sums[f"{name} steps"] = steps + int(torch.stack(counts[name]).sum())
        self._losses = []
        return dict(self._sums)

    def compute(self) -> dict[str, float]:
        """Means of the losses, and speed; the next are those of what comes after."""
        sums, took_s, steps = self.sums(), time.perf_counter() - self._began_s, max(self._steps, 1)
        means = {
            f"train/{name}": sums[name] / sums[f"{name} steps"] if sums[f"{name} steps"] else math.nan
            for name in sums
            if not name.endswith(" steps")
        }
        means["train/skipped"] = sums.get("skipped", 0.0)
        means["speed/clips_per_s"] = steps * self.batch / took_s
        means["speed/step_ms"] = 1000 * took_s / steps
        means["speed/data_wait_fraction"] = self._waited_s / took_s
        means["speed/memory_gb"] = peak_memory_bytes() / 1e9
        tera = (self.flops or 0) * steps / took_s / 1e12
        means["speed/tflops_per_worker"] = tera
        if self.device.type == "cuda":
            means["speed/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
            if peak:
                means["speed/model_flop_utilisation"] = tera / peak
        self._sums = {}
        return means


def _reset_peaks(device: torch.device) -> None:
    """Peaks of memory count from here on, but on systems where only those of the whole process can be had."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes() -> int:
    """The most resident memory that this process had since its ThroughputMonitor was made."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_tflops(device: str) -> float | None:
    """The peak of a GPU of this name, in 10^12 operations a second; None for one that is unknown, or a slice of one."""
    words = set(re.split(r"[\s-]+", device))
    if any(_SLICE.fullmatch(word) for word in words):
        return None
    return next((peak for name, peak in _PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def profiler(wanted: bool, keep: Callable[[Path], None]) -> profile | Untraced:
    """To be told of each step: traces five after the first seven, and hands the file to `keep` (chrome://tracing)."""
    if not wanted:
        return Untraced()

    def ready(traced: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            traced.export_chrome_trace(str(path))
            keep(path)

    traced = profile(schedule=_TRACED, on_trace_ready=ready, profile_memory=True)
    traced.start()
    return traced


class Untraced:
    def step(self) -> None: ...

    def stop(self) -> None: ...
