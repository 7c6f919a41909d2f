"""System metrics, compared with MLflow's own monitors, and hours that add up over restarts."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.tracking import MlflowClient

from giffy_ray.config import Experiment, override
from giffy_ray.tracking import system_metrics
from giffy_ray.tracking.tracker import open_run, tracking_uri

GIGA = 10**9
NVML = {  # a machine with two GPUs
    "nvmlInit": lambda: None,
    "nvmlDeviceGetCount": lambda: 2,
    "nvmlDeviceGetHandleByIndex": lambda number: number,
    "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=(gpu + 1) * 10 * GIGA, total=80 * GIGA),
    "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40 + gpu),
    "nvmlDeviceGetPowerUsage": lambda gpu: 350_000,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
}
GPU_METRICS = {
    *("memory_usage_percentage", "memory_usage_megabytes", "utilization_percentage"),
    *("power_usage_watts", "power_usage_percentage"),
}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in NVML.items():
        monkeypatch.setattr(pynvml, name, answer)
    system_metrics._warn_once.cache_clear()


def raise_not_supported(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def read_with_mlflow(monitor) -> dict[str, float]:
    monitor.collect_metrics()
    return {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}


def test_machine_metrics_match_those_of_mlflow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 37.5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(used=3 * GIGA, total=24 * GIGA))
    assert system_metrics.read_machine() == read_with_mlflow(CPUMonitor())
    assert system_metrics.read_machine()["system/system_memory_usage_percentage"] == 12.5


def test_gpu_metrics_match_those_of_mlflow(nvml: None):
    """NVML is faked, so that the test runs without GPUs. On a machine with an H100 they matched too."""
    metrics = system_metrics.read_gpus(system_metrics.open_gpus())
    assert metrics == read_with_mlflow(GPUMonitor())
    assert metrics["system/gpu_1_memory_usage_percentage"] == 25
    assert metrics["system/gpu_0_power_usage_percentage"] == 50
    assert metrics.keys() == {f"system/gpu_{index}_{name}" for index in (0, 1) for name in GPU_METRICS}


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("nvmlDeviceGetMemoryInfo", {"memory_usage_percentage", "memory_usage_megabytes"}),  # unified memory
        ("nvmlDeviceGetUtilizationRates", {"utilization_percentage"}),  # MIG
        ("nvmlDeviceGetPowerUsage", {"power_usage_watts", "power_usage_percentage"}),  # vGPU
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_usage_percentage"}),
    ],
)
def test_an_unsupported_gpu_value_loses_no_other_and_is_logged_once(
    nvml: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, missing: set[str]
):
    monkeypatch.setattr(pynvml, call, lambda gpu: raise_not_supported() if gpu == 0 else NVML[call](gpu))
    for _ in range(2):
        sampled = system_metrics.read_gpus(system_metrics.open_gpus())
        assert sampled.keys() == {f"system/gpu_1_{name}" for name in GPU_METRICS} | {
            f"system/gpu_0_{name}" for name in GPU_METRICS - missing
        }
    assert len(caplog.messages) == len(missing)
    assert all(any(f"gpu_0_{name} " in message for message in caplog.messages) for name in missing)


def test_a_power_limit_of_zero_gives_no_percentage(nvml: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEnforcedPowerLimit", lambda gpu: 0)
    assert system_metrics.read_gpus([0]).keys() == {
        f"system/gpu_0_{name}" for name in GPU_METRICS - {"power_usage_percentage"}
    }


def test_a_failing_gpu_loses_no_values_of_the_others(nvml: None, monkeypatch: pytest.MonkeyPatch):
    handle = lambda number: raise_not_supported() if number == 0 else number  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    assert system_metrics.read_gpus(system_metrics.open_gpus()).keys() == {
        f"system/gpu_1_{name}" for name in GPU_METRICS
    }


def test_cost_is_logged_even_if_nothing_else_can_be_read(nvml: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise FileNotFoundError("/proc/stat")

    for name in ("cpu_percent", "virtual_memory"):
        monkeypatch.setattr(psutil, name, fail)
    for name in NVML.keys() - {"nvmlInit"}:
        monkeypatch.setattr(pynvml, name, raise_not_supported)
    logged: list[dict[str, float]] = []
    system_metrics.SystemMetricsSampler(
        lambda values, step: logged.append(values), str(tmp_path), cpus=2, gpus=1
    ).stop()
    (sample,) = logged
    assert sample.keys() == {"cost/cpu_hours", "cost/gpu_hours"}
    assert sample["cost/cpu_hours"] == pytest.approx(2 * sample["cost/gpu_hours"])


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"samples": "x", "cpu_hours": 1, "gpu_hours": 1}'])
def test_a_damaged_usage_file_loses_no_sample(content: bytes, tmp_path: Path):
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "used.json").write_bytes(content)
    logged: list[dict[str, float]] = []
    system_metrics.SystemMetricsSampler(
        lambda values, step: logged.append(values), str(tmp_path), cpus=2, gpus=1
    ).stop()
    (sample,) = logged
    assert {"cost/cpu_hours", "cost/gpu_hours"} <= sample.keys()
    assert sample["cost/cpu_hours"] < 0.01


def test_a_machine_without_an_nvidia_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch):
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert system_metrics.open_gpus() == []


@pytest.mark.parametrize(
    "failure",
    [
        pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),  # after a driver update without a reboot
        pynvml.NVMLLibraryMismatchError("Unversioned function called"),  # not an NVMLError
        OSError("libnvidia-ml.so: file too short"),
    ],
)
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_an_nvml_failure_is_logged_once(
    nvml: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, failure: Exception
):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(pynvml, call, fail)
    for _ in range(2):
        assert system_metrics.read_gpus(system_metrics.open_gpus()) == {}
    assert [type(failure).__name__ in message for message in caplog.messages] == [True] * (2 if "Handle" in call else 1)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


def test_a_restart_adds_to_the_cost_and_counts_nothing_twice(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system_metrics, "INTERVAL_S", 0.2)
    took_s, client = 0.0, MlflowClient(tracking_uri(experiment))
    for cpus, gpus in ((2.0, 0.5), (2.0, 0.5)):
        tracker, began_s = open_run(experiment), time.monotonic()
        tracker.sample_system_metrics(cpus, gpus)
        time.sleep(0.7)
        tracker._sampler.stop()  # type: ignore[union-attr]
        took_s += time.monotonic() - began_s
        tracker.finish()
        time.sleep(0.3)  # not counted
    cpu_hours = client.get_metric_history(tracker.run_id, "cost/cpu_hours")
    assert [metric.step for metric in cpu_hours] == list(range(1, len(cpu_hours) + 1))
    assert len(cpu_hours) >= 4
    assert all(after.value > before.value for before, after in itertools.pairwise(cpu_hours))
    assert cpu_hours[-1].value == pytest.approx(2 * took_s / 3600, rel=0.05)
    run = client.get_run(tracker.run_id).data.metrics
    assert run["cost/gpu_hours"] == pytest.approx(run["cost/cpu_hours"] / 4)
    assert 0 <= run["system/cpu_utilization_percentage"] <= 100


def test_the_next_sample_counts_the_time_of_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(system_metrics, "INTERVAL_S", 0.1)
    logged: list[dict[str, float]] = []
    write_text, failures = system_metrics.write_text, iter([True, False, False, False])

    def fail_at_first(*args: str) -> None:
        if next(failures, False):
            raise OSError("no space left")
        write_text(*args)

    monkeypatch.setattr(system_metrics, "write_text", fail_at_first)
    began_s = time.monotonic()
    sampler = system_metrics.SystemMetricsSampler(
        lambda values, step: logged.append(values), str(tmp_path), cpus=1, gpus=0
    )
    time.sleep(0.35)
    sampler.stop()
    took_s = time.monotonic() - began_s
    assert "no space left" in caplog.text
    assert logged[-1]["cost/cpu_hours"] == pytest.approx(took_s / 3600, rel=0.15)  # a lost sample would be 0.29 of it


def test_failures_of_the_log_are_logged_once_and_stop_ends_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(system_metrics, "INTERVAL_S", 0.02)
    attempts = []

    def log(values: dict[str, float], step: int) -> None:
        attempts.append(step)
        raise OSError(f"No space left on device, attempt {step}")

    sampler = system_metrics.SystemMetricsSampler(log, str(tmp_path), cpus=1, gpus=0)
    while len(attempts) < 4:
        time.sleep(0.01)
    sampler.stop(sample=False)
    assert not sampler._thread.is_alive()
    assert sum("could not sample" in record.message for record in caplog.records) == 1
