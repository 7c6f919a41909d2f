"""What is sampled of a machine, beside MLflow's own monitors, and hours that add up over restarts."""

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
NVML = {  # of two GPUs
    "nvmlInit": lambda: None,
    "nvmlDeviceGetCount": lambda: 2,
    "nvmlDeviceGetHandleByIndex": lambda number: number,
    "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=(gpu + 1) * 10 * GIGA, total=80 * GIGA),
    "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40 + gpu),
    "nvmlDeviceGetPowerUsage": lambda gpu: 350_000,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
}
OF_A_GPU = {
    *("memory_usage_percentage", "memory_usage_megabytes", "utilization_percentage"),
    *("power_usage_watts", "power_usage_percentage"),
}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in NVML.items():
        monkeypatch.setattr(pynvml, name, answer)
    system_metrics._warn_once.cache_clear()


def refused(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def of_mlflow(monitor) -> dict[str, float]:
    monitor.collect_metrics()
    return {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}


def test_the_machine_is_read_as_mlflow_reads_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 37.5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(used=3 * GIGA, total=24 * GIGA))
    assert system_metrics.machine() == of_mlflow(CPUMonitor())
    assert system_metrics.machine()["system/system_memory_usage_percentage"] == 12.5


def test_gpus_are_read_as_mlflow_reads_them(nvml: None):
    """NVML is stood in for, as a machine without GPUs has none to ask; on one with an H100 they agreed too."""
    ours = system_metrics.of_gpus(system_metrics.gpus_here())
    assert ours == of_mlflow(GPUMonitor())
    assert ours["system/gpu_1_memory_usage_percentage"] == 25
    assert ours["system/gpu_0_power_usage_percentage"] == 50
    assert ours.keys() == {f"system/gpu_{number}_{name}" for number in (0, 1) for name in OF_A_GPU}


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("nvmlDeviceGetMemoryInfo", {"memory_usage_percentage", "memory_usage_megabytes"}),  # unified memory
        ("nvmlDeviceGetUtilizationRates", {"utilization_percentage"}),  # MIG
        ("nvmlDeviceGetPowerUsage", {"power_usage_watts", "power_usage_percentage"}),  # vGPU
        ("nvmlDeviceGetEnforcedPowerLimit", {"power_usage_percentage"}),
    ],
)
def test_a_value_that_a_gpu_lacks_costs_no_other_and_is_named_once(
    nvml: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, missing: set[str]
):
    monkeypatch.setattr(pynvml, call, lambda gpu: refused() if gpu == 0 else NVML[call](gpu))
    for _ in range(2):
        sampled = system_metrics.of_gpus(system_metrics.gpus_here())
        assert sampled.keys() == {f"system/gpu_1_{name}" for name in OF_A_GPU} | {
            f"system/gpu_0_{name}" for name in OF_A_GPU - missing
        }
    assert len(caplog.messages) == len(missing)
    assert all(any(f"gpu_0_{name} " in said for said in caplog.messages) for name in missing)


def test_a_limit_of_nothing_is_no_percentage(nvml: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEnforcedPowerLimit", lambda gpu: 0)
    assert system_metrics.of_gpus([0]).keys() == {
        f"system/gpu_0_{name}" for name in OF_A_GPU - {"power_usage_percentage"}
    }


def test_a_gpu_that_cannot_be_asked_leaves_the_others_their_numbers(nvml: None, monkeypatch: pytest.MonkeyPatch):
    handle = lambda number: refused() if number == 0 else number  # noqa: E731
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    assert system_metrics.of_gpus(system_metrics.gpus_here()).keys() == {f"system/gpu_1_{name}" for name in OF_A_GPU}


def test_what_a_run_costs_is_logged_whatever_cannot_be_read(
    nvml: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def hidden(*_: object) -> None:
        raise FileNotFoundError("/proc/stat")

    for name in ("cpu_percent", "virtual_memory"):
        monkeypatch.setattr(psutil, name, hidden)
    for name in NVML.keys() - {"nvmlInit"}:
        monkeypatch.setattr(pynvml, name, refused)
    logged: list[dict[str, float]] = []
    system_metrics.Sampler(lambda values, step: logged.append(values), str(tmp_path), cpus=2, gpus=1).end()
    (sample,) = logged
    assert sample.keys() == {"cost/cpu_hours", "cost/gpu_hours"}
    assert sample["cost/cpu_hours"] == pytest.approx(2 * sample["cost/gpu_hours"])


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"samples": "x", "cpu_hours": 1, "gpu_hours": 1}'])
def test_a_damaged_count_of_what_a_run_has_cost_costs_no_sample(content: bytes, tmp_path: Path):
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "used.json").write_bytes(content)
    logged: list[dict[str, float]] = []
    system_metrics.Sampler(lambda values, step: logged.append(values), str(tmp_path), cpus=2, gpus=1).end()
    (sample,) = logged
    assert {"cost/cpu_hours", "cost/gpu_hours"} <= sample.keys()
    assert sample["cost/cpu_hours"] < 0.01


def test_a_machine_without_nvidias_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch):
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert system_metrics.gpus_here() == []


@pytest.mark.parametrize(
    "failure",
    [
        pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),  # after an update of the driver
        pynvml.NVMLLibraryMismatchError("Unversioned function called"),  # no NVMLError
        OSError("libnvidia-ml.so: file too short"),
    ],
)
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_nvml_that_fails_costs_no_other_value_and_is_named_once(
    nvml: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, failure: Exception
):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(pynvml, call, fail)
    for _ in range(2):
        assert system_metrics.of_gpus(system_metrics.gpus_here()) == {}
    assert [type(failure).__name__ in said for said in caplog.messages] == [True] * (2 if "Handle" in call else 1)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


def test_a_start_adds_to_what_the_run_has_cost_and_counts_nothing_twice(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.2)
    took_s, client = 0.0, MlflowClient(tracking_uri(experiment))
    for cpus, gpus in ((2.0, 0.5), (2.0, 0.5)):
        tracker, began_s = open_run(experiment), time.monotonic()
        tracker.sample(cpus, gpus)
        time.sleep(0.7)
        tracker._sampler.end()  # type: ignore[union-attr]
        took_s += time.monotonic() - began_s
        tracker.finish()
        time.sleep(0.3)  # which nobody pays for
    cpu_hours = client.get_metric_history(tracker.run_id, "cost/cpu_hours")
    assert [metric.step for metric in cpu_hours] == list(range(1, len(cpu_hours) + 1))
    assert len(cpu_hours) >= 4
    assert all(after.value > before.value for before, after in itertools.pairwise(cpu_hours))
    assert cpu_hours[-1].value == pytest.approx(2 * took_s / 3600, rel=0.05)
    run = client.get_run(tracker.run_id).data.metrics
    assert run["cost/gpu_hours"] == pytest.approx(run["cost/cpu_hours"] / 4)
    assert 0 <= run["system/cpu_utilization_percentage"] <= 100


def test_a_sample_that_fails_ends_nothing_and_its_time_is_counted_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.1)
    logged: list[dict[str, float]] = []
    written, times = system_metrics.write_text, iter([True, False, False, False])

    def full_at_first(*of_file: str) -> None:
        if next(times, False):
            raise OSError("no space left")
        written(*of_file)

    monkeypatch.setattr(system_metrics, "write_text", full_at_first)
    began_s = time.monotonic()
    sampler = system_metrics.Sampler(lambda values, step: logged.append(values), str(tmp_path), cpus=1, gpus=0)
    time.sleep(0.35)
    sampler.end()
    took_s = time.monotonic() - began_s
    assert "no space left" in caplog.text
    assert logged[-1]["cost/cpu_hours"] == pytest.approx(took_s / 3600, rel=0.15)  # a lost sample is 0.29 of it


def test_a_log_that_fails_is_told_of_once_and_the_thread_ends_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.02)
    attempts = []

    def log(values: dict[str, float], step: int) -> None:
        attempts.append(step)
        raise OSError(f"No space left on device, attempt {step}")

    sampler = system_metrics.Sampler(log, str(tmp_path), cpus=1, gpus=0)
    while len(attempts) < 4:
        time.sleep(0.01)
    sampler.end(sample=False)
    assert not sampler._thread.is_alive()
    assert sum("was not sampled" in record.message for record in caplog.records) == 1
