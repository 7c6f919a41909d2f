"""Measures training steps: mean losses and throughput per epoch, FLOPs, peak memory, and a profiler trace."""

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

# Peak dense bfloat16 TFLOP/s (float16 where there is no bfloat16), from the vendors' data sheets. The keys are words of
# the name that NVML and torch report for a device; the first entry whose words all occur applies.
_PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 HBM2e": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "B200": 2250,
    "GB200": 2500,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "V100 PCIE": 112,
    "V100 FHHL": 105,
    "V100S": 130,
    "V100": 125,
    "T4": 65,
}
# Part of a GPU, with part of its peak: a MIG instance, or a vGPU profile (A10-24Q, A100-1-5CME).
_GPU_SLICE = re.compile(r"MIG|GRID|\d+[ABCQ](ME)?")
_PROFILER_SCHEDULE = schedule(wait=5, warmup=2, active=5, repeat=1)  # steps
_STEPS_SUFFIX = " steps"  # `<loss> steps` among the sums counts the steps that had the loss


class ThroughputMonitor:
    """Accumulates the losses and times of training steps until `compute` is called.

    A checkpoint stores the sums of `reduce_sums`, so that the means of an interrupted epoch cover all of its steps.
    """

    def __init__(self, sums: Mapping[str, float], global_batch_size: int, device: torch.device, skipped_steps: int = 0):
        """Starts the clock.

        Args:
            sums: The result of `reduce_sums` in the checkpoint that the run resumes from; empty for a new run.
            global_batch_size: Clips per step over all ranks.
            device: Where the networks are.
            skipped_steps: Steps that the run skipped before. They count towards `train.max_skipped_steps`.
        """
        self.global_batch_size, self.device = global_batch_size, device
        self.skipped_steps = skipped_steps
        self.last_skipped_step = -1  # -1: none since this process started
        self.flops_per_step: int | None = None  # of this rank
        self._pending_skip: tuple[int, AsyncHostCopy] | None = None  # the last step and its `skipped` flag
        self._sums = dict(sums)
        self._losses: list[tuple[Mapping[str, Tensor], float]] = []  # of each step, with this rank's share of the batch
        _reset_peak_memory(device)  # a search trains one trial after another in the same process
        self.reset()

    def reset(self) -> None:
        """Restarts the clock, so that the time of a validation does not count as time of the next step."""
        self._data_wait_s, self._steps, self._start_s = 0.0, 0, time.perf_counter()

    @contextmanager
    def count_flops_once(self) -> Iterator[None]:
        """Counts the FLOPs of matmuls and convolutions of the first step that runs inside this context."""
        if self.flops_per_step is not None:
            yield
            return
        # Compiled code cannot be counted, so this step runs eagerly.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self.flops_per_step = counter.get_total_flops()

    def add_data_wait(self, seconds: float) -> None:
        self._data_wait_s += seconds

    def add_step(self, step: int, losses: Mapping[str, Tensor], clips: int) -> None:
        """Adds a step.

        The skip flag is read one step later, when the next step is already queued, to avoid a device sync.

        Args:
            step: Its number, from 0.
            losses: Means over this rank's clips; `skipped` is above 0 if the step was skipped.
            clips: Number of this rank's clips.
        """
        self._losses.append((losses, clips / self.global_batch_size))
        self._steps += 1
        self._read_pending_skip()
        self._pending_skip = step, AsyncHostCopy(losses["skipped"])

    def _read_pending_skip(self) -> None:
        if self._pending_skip is None:
            return
        step, flag = self._pending_skip
        if any(flag.wait()):
            self.skipped_steps += 1
            self.last_skipped_step = step
        self._pending_skip = None

    def reduce_sums(self) -> dict[str, float]:
        """Sums each loss over ranks and over the steps since the last `compute`. Every rank must call this.

        The losses of a skipped step may be NaN and do not count.

        Returns:
            For each loss the sum of its means over global batches, and as `<loss> steps` the number of steps that had
            it.
        """
        self._read_pending_skip()
        values: dict[str, list[Tensor]] = {}
        counts: dict[str, list[Tensor]] = {}
        for losses, share in self._losses:
            applied = losses["skipped"] == 0
            for name, loss in losses.items():
                counted = torch.ones_like(applied) if name == "skipped" else applied
                values.setdefault(name, []).append(torch.where(counted, share * loss.double(), 0.0))
                counts.setdefault(name, []).append(counted)
        names = sorted(values)
        totals = distributed.all_reduce_sum([float(torch.stack(values[name]).sum()) for name in names], self.device)
        for name, total in zip(names, totals, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total
            steps = self._sums.get(f"{name}{_STEPS_SUFFIX}", 0.0)
            self._sums[f"{name}{_STEPS_SUFFIX}"] = steps + int(torch.stack(counts[name]).sum())
        self._losses = []
        return dict(self._sums)

    def compute(self) -> dict[str, float]:
        """Returns `train/*` means and `speed/*` since the last call, and starts over with empty sums.

        Every rank must call this.
        """
        sums = self.reduce_sums()
        elapsed_s = time.perf_counter() - self._start_s
        steps = max(self._steps, 1)
        means = {
            f"train/{name}": sums[name] / sums[f"{name}{_STEPS_SUFFIX}"] if sums[f"{name}{_STEPS_SUFFIX}"] else math.nan
            for name in sums
            if not name.endswith(_STEPS_SUFFIX)
        }
        means["train/skipped"] = sums.get("skipped", 0.0)
        means["speed/clips_per_s"] = steps * self.global_batch_size / elapsed_s
        means["speed/step_ms"] = 1000 * elapsed_s / steps
        means["speed/data_wait_fraction"] = self._data_wait_s / elapsed_s
        means["speed/memory_gb"] = peak_memory_bytes() / 1e9
        tflops = (self.flops_per_step or 0) * steps / elapsed_s / 1e12
        means["speed/tflops_per_worker"] = tflops
        if self.device.type == "cuda":
            means["speed/gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
            if peak:
                means["speed/model_flop_utilisation"] = tflops / peak
        self._sums = {}
        return means


def _reset_peak_memory(device: torch.device) -> None:
    """Starts the memory peaks over, except on systems that report only the peak of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process since the last ThroughputMonitor was created."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_tflops(device_name: str) -> float | None:
    """Peak TFLOP/s of a GPU; None for an unknown GPU or a slice of one."""
    words = set(re.split(r"[\s-]+", device_name))
    if any(_GPU_SLICE.fullmatch(word) for word in words):
        return None
    return next((peak for name, peak in _PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def start_profiler(enabled: bool, save_trace: Callable[[Path], None]) -> profile | NullProfiler:
    """Returns a started profiler; call step() once per training step, and stop() at the end.

    Skips 7 steps, records 5, and passes the Chrome trace (for `chrome://tracing`) to `save_trace`.
    """
    if not enabled:
        return NullProfiler()

    def export(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(path))
            save_trace(path)

    profiler = profile(schedule=_PROFILER_SCHEDULE, on_trace_ready=export, profile_memory=True)
    profiler.start()
    return profiler


class NullProfiler:
    """Stands in for a profiler that is off."""

    def step(self) -> None: ...

    def stop(self) -> None: ...
