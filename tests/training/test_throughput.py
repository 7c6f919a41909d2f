"""What a step costs in memory, in a process that trains one network after another."""

import mmap

import pytest
import torch

from giffy_ray.training import throughput
from giffy_ray.training.throughput import ThroughputMonitor

CPU = torch.device("cpu")
MEGA = 10**6


def test_memory_is_that_of_this_training_and_not_of_one_before_it_in_the_process():
    ThroughputMonitor({}, 1, CPU)
    before = throughput.peak_memory_bytes()
    block = mmap.mmap(-1, 300 * MEGA)  # which the kernel gets back at once, as malloc's may not
    block.write(bytes(1) * (300 * MEGA))
    assert throughput.peak_memory_bytes() > before + 250 * MEGA
    block.close()
    assert throughput.peak_memory_bytes() > before + 250 * MEGA
    later = ThroughputMonitor({}, 1, CPU)
    assert throughput.peak_memory_bytes() < before + 100 * MEGA
    later.add(0, {"skipped": torch.zeros(())}, 1)
    assert later.compute()["speed/memory_gb"] == pytest.approx(throughput.peak_memory_bytes() / 1e9, rel=0.1)


def test_the_peak_of_a_gpu_starts_anew_with_each_training(monkeypatch: pytest.MonkeyPatch):
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    ThroughputMonitor({}, 1, CPU)
    assert reset == []
    ThroughputMonitor({}, 1, torch.device("cuda", 0))
    assert reset == [torch.device("cuda", 0)]
