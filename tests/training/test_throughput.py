"""Memory peaks, in a process that trains one network after another."""

import mmap

import pytest
import torch

from giffy_ray.training import throughput
from giffy_ray.training.throughput import ThroughputMonitor

CPU = torch.device("cpu")
MEGA = 10**6


def test_peak_memory_does_not_include_an_earlier_training_in_the_process():
    ThroughputMonitor({}, 1, CPU)
    before = throughput.peak_memory_bytes()
    block = mmap.mmap(-1, 300 * MEGA)  # returned to the kernel at once, unlike memory from malloc
    block.write(bytes(1) * (300 * MEGA))
    assert throughput.peak_memory_bytes() > before + 250 * MEGA
    block.close()
    assert throughput.peak_memory_bytes() > before + 250 * MEGA
    throughput_monitor = ThroughputMonitor({}, 1, CPU)
    assert throughput.peak_memory_bytes() < before + 100 * MEGA
    throughput_monitor.add_step(0, {"skipped": torch.zeros(())}, 1)
    assert throughput_monitor.compute()["speed/memory_gb"] == pytest.approx(
        throughput.peak_memory_bytes() / 1e9, rel=0.1
    )


def test_each_training_resets_the_peak_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch):
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    ThroughputMonitor({}, 1, CPU)
    assert devices == []
    ThroughputMonitor({}, 1, torch.device("cuda", 0))
    assert devices == [torch.device("cuda", 0)]
