"""Checks before a training, its resources, signals, and how its errors surface."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.core.generated import autoscaler_pb2
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from ray.train.v2._internal.constants import PREEMPTION_POLL_INTERVAL_S_ENV_VAR
from ray.train.v2._internal.state.schema import RunSettings

from giffy_ray.cluster import resources, shared_storage
from giffy_ray.cluster.local import JOB_STOP_WAIT_ENV
from giffy_ray.cluster.resources import WorkerResources, resources_for, trial_resources_for
from giffy_ray.config import ConfigError, Experiment, override, to_yaml
from giffy_ray.core.run_lock import RunLockLost, RunLockWatcher
from giffy_ray.core.storage import filesystem_of
from giffy_ray.training import (
    checkpoint_selection,
    checkpoints,
    learners,
    planned_restarts,
    preemption,
)
from giffy_ray.training import trainer as trainer_module
from giffy_ray.training.checkpoint_format import TrainState
from giffy_ray.training.train_loop import validation_schedule
from giffy_ray.training.trainer import (
    MUTABLE_FIELDS,
    _build_trainer,
    _validate_run_config,
    _warn_if_disk_is_small,
    check_experiment,
    check_run,
    estimate_checkpoint_bytes,
    locked_run,
    train,
)
from giffy_ray.tuning import tuner


@pytest.mark.parametrize(("clips", "batch"), [(96, 8), (100, 8), (7, 20), (2000, 20), (5, 5)])
def test_validation_follows_the_step_that_completes_its_epoch(clips: int, batch: int):
    schedule = validation_schedule(clips, override(Experiment(), {"train.global_batch_size": batch, "train.epochs": 5}))
    assert list(schedule.values())[-1] == 5
    for end, epoch in schedule.items():
        assert end * batch >= epoch * clips > (end - 1) * batch
    every_30_epochs = override(Experiment(), {"train.validate_every": 30})
    assert validation_schedule(2000, every_30_epochs) == {
        3000: 30,
        6000: 60,
        9000: 90,
        10_000: 100,
    }  # 100 steps an epoch


class FakeDataset:
    location, fingerprint = "the-dataset", "abc"

    def __init__(self, training: int, validation: int):
        self.indices = {"training": np.arange(training), "validation": np.arange(validation)}

    def split_indices(self, split: str) -> np.ndarray:
        return self.indices[split]


@pytest.mark.parametrize(
    ("changes", "dataset", "message"),
    [
        (
            {"train.global_batch_size": 2, "cluster.workers": 3},
            FakeDataset(5, 5),
            r"train\.global_batch_size.*cluster\.workers=3 \(value 2\)",
        ),
        ({}, FakeDataset(0, 5), "no training clips.*the-dataset"),
        ({}, FakeDataset(5, 0), "no validation clips.*the-dataset"),
    ],
)
def test_untrainable_experiment_or_dataset_is_rejected(changes, dataset, message):
    with pytest.raises(ConfigError, match=message):
        check_run(override(Experiment(), changes), dataset)
    check_run(Experiment(), FakeDataset(5, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["published/nothing", "nothing"])
def test_missing_init_from_is_rejected_before_anything_starts(tmp_path, start: str):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine", "train.init_from": start})
    with pytest.raises(ConfigError, match=rf"train\.init_from: .*\(value '{start}'"):
        train(experiment, FakeDataset(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert not (tmp_path / "mine" / "experiment.yaml").exists()


def test_run_does_not_resume_with_other_clips_or_settings(tmp_path):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    dataset, worker_resources = FakeDataset(5, 5), WorkerResources(1, 0, 1)
    dataset.fingerprint = "now"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data_set").write_text("before")
    (tmp_path / "mine" / "experiment.yaml").write_text(to_yaml(experiment))
    with pytest.raises(ConfigError, match="'mine' was started with other clips than those that are now in the-dataset"):
        train(experiment, dataset, worker_resources)  # type: ignore[arg-type]
    (tmp_path / "mine" / "data_set").write_text("now")
    changed = override(experiment, {"optim.lr": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr: the run 'mine' was started with 0\.0001 \(value 0\.5\)"):
        train(changed, dataset, worker_resources)  # type: ignore[arg-type]
    changed = override(experiment, {"model.kind": "cgan"})
    with pytest.raises(ConfigError, match=r"model\.kind: the run 'mine' was started with 'cvae' \(value 'cgan'\)"):
        train(changed, dataset, worker_resources)  # type: ignore[arg-type]


def test_init_from_a_different_model_is_rejected_before_anything_starts(tiny: Experiment, tmp_path):
    source = override(tiny, {"storage": str(tmp_path), "name": "source"})
    learner = learners.build(source, torch.device("cpu"))
    snapshot = checkpoints.Snapshot(learner, source, TrainState(0))
    checkpoint_dir = checkpoints.new_checkpoint_path(source)
    snapshot.write(*filesystem_of(checkpoint_dir))
    experiment = override(source, {"name": "mine", "train.init_from": checkpoint_dir})
    check_experiment(experiment)
    with pytest.raises(ConfigError, match=r"train\.init_from: .* belongs to a different model: .*cvae"):
        check_experiment(override(experiment, {"model.latent": 5}))


def test_network_too_large_for_torch_is_rejected():
    sizes = {"model.latent": 2**31 - 1, "model.video_hidden": 2**31 - 1}
    with pytest.raises(ConfigError, match="model: torch cannot build a cvae of these sizes"):
        check_experiment(override(Experiment(), sizes))


def test_training_whose_checkpoints_do_not_fit_is_rejected(tmp_path, tiny, monkeypatch, capsys):
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.keep_checkpoints": 4})
    size = estimate_checkpoint_bytes(experiment)

    def warning_with(available: int) -> str:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=available))
        with locked_run(experiment, FakeDataset(5, 5)):  # type: ignore[arg-type]
            _warn_if_disk_is_small(experiment)
        return capsys.readouterr().err

    with pytest.raises(
        ConfigError, match=r"storage: a checkpoint of 'mine' takes about .* free some space, or use another folder"
    ):
        warning_with(2 * size - 1)
    assert not (tmp_path / "mine" / "experiment.yaml").exists()
    assert "warning: train.keep_checkpoints: up to 7 checkpoints of" in warning_with(2 * size)
    assert warning_with(7 * size) == ""
    assert (tmp_path / "mine" / "data_set_location").read_text() == "the-dataset"


def test_study_whose_checkpoints_do_not_fit_prints_a_warning(tmp_path, tiny, monkeypatch, capsys):
    study = override(tiny, {"storage": str(tmp_path), "name": "mine", "search.trials": 50})
    study = override(study, {"search.space": {"optim.lr": {"log_uniform": (1e-5, 1e-3)}}})
    size = estimate_checkpoint_bytes(study)
    for available, expects_warning in ((50 * size - 1, True), (50 * size, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=available: SimpleNamespace(free=free))
        with tuner.lock_study(study, FakeDataset(5, 5)):  # type: ignore[arg-type]
            pass
        assert ("warning: search.trials: the checkpoints of 50 trials" in capsys.readouterr().err) == expects_warning


@pytest.mark.parametrize("kind", ["cgan", "between", "two_stream", "direct_3d"])
def test_run_does_not_resume_with_another_model(tmp_path, kind: str):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    _validate_run_config(experiment, FakeDataset(5, 5), MUTABLE_FIELDS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"model\.kind: the run 'mine' was started with 'cvae' \(value '{kind}'\)"):
        _validate_run_config(override(experiment, {"model.kind": kind}), FakeDataset(5, 5), MUTABLE_FIELDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name: [", b"a_field_of_tomorrow: 1"])
def test_unreadable_experiment_file_of_a_run_is_named(tmp_path, content: bytes):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    _validate_run_config(experiment, FakeDataset(5, 5), MUTABLE_FIELDS)  # type: ignore[arg-type]
    (tmp_path / "mine" / "experiment.yaml").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"/mine/experiment\.yaml: cannot read the experiment that the run was started with: "
    ):
        _validate_run_config(experiment, FakeDataset(5, 5), MUTABLE_FIELDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [50, 200])
def test_cosine_schedule_cannot_change_its_number_of_epochs(tmp_path, epochs: int):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine", "optim.schedule": "cosine"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data_set").write_text("abc")
    (tmp_path / "mine" / "experiment.yaml").write_text(to_yaml(experiment))
    message = rf"train\.epochs: the cosine schedule .* 100 epochs.*\(value {epochs}\).*train\.init_from=mine"
    with pytest.raises(ConfigError, match=message):
        train(override(experiment, {"train.epochs": epochs}), FakeDataset(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["speed.compress_gradients", "speed.sync_batch_norm"])
def test_gpu_only_fields_are_rejected_without_a_gpu(monkeypatch: pytest.MonkeyPatch, field: str):
    cluster_of(monkeypatch, {"CPU": 8})
    with pytest.raises(ConfigError, match=rf"{field}: needs GPUs"):
        resources_for(override(Experiment(), {field: True}))
    cluster_of(monkeypatch, {"CPU": 8, "GPU": 2})
    assert resources_for(override(Experiment(), {field: True})).gpus_per_worker == 1


@pytest.mark.parametrize(
    ("node_resources", "workers", "expected"),
    [
        ({"CPU": 2}, 2, (0.5, 0, 1)),
        ({"CPU": 2}, 1, (1, 0, 1)),
        ({"CPU": 16}, 2, (7, 0, 1)),
        ({"CPU": 64, "GPU": 8}, 2, (1, 1, 4)),
        ({"CPU": 64, "GPU": 8}, 8, (1, 1, 1)),
    ],
)
def test_workers_leave_one_cpu_to_the_data_tasks(monkeypatch, node_resources, workers, expected):
    cluster_of(monkeypatch, node_resources)
    worker_resources = resources_for(override(Experiment(), {"cluster.workers": workers, "data.cache_decoded": False}))
    assert (
        worker_resources.cpus_per_worker,
        worker_resources.gpus_per_worker,
        worker_resources.max_concurrent,
    ) == expected
    assert workers * worker_resources.cpus_per_worker * worker_resources.max_concurrent <= node_resources["CPU"] - 1


@pytest.mark.parametrize(
    ("node_resources", "workers", "gpus_per_worker", "expected"),
    [
        ({"CPU": 64, "GPU": 8}, 1, 1.0, (1, 1, 8)),
        ({"CPU": 64, "GPU": 8}, 1, 0.25, (1, 0.25, 32)),
        ({"CPU": 64, "GPU": 4}, 1, 0.4, (1, 0.4, 8)),  # two per GPU: the remaining 0.2 is too little
        ({"CPU": 64, "GPU": 3}, 1, 0.1, (1, 0.1, 30)),
        ({"CPU": 64, "GPU": 8}, 1, 2.0, (1, 2, 4)),
        ({"CPU": 64, "GPU": 8}, 2, 1.0, (1, 1, 4)),
        ({"CPU": 64, "GPU": 8}, 2, 2.0, (1, 2, 2)),
        ({"CPU": 64, "GPU": 8}, 2, 4.0, (1, 4, 1)),
        ({"CPU": 5, "GPU": 8}, 2, 1.0, (1, 1, 2)),
        ({"CPU": 16}, 2, 1.0, (1, 0, 8)),
    ],
)
def test_trial_gets_the_gpus_that_its_workers_need(monkeypatch, node_resources, workers, gpus_per_worker, expected):
    cluster_of(monkeypatch, node_resources)
    changes = {"search.workers": workers, "search.gpus_per_worker": gpus_per_worker}
    worker_resources = trial_resources_for(override(Experiment(), changes))
    assert (
        worker_resources.cpus_per_worker,
        worker_resources.gpus_per_worker,
        worker_resources.max_concurrent,
    ) == expected
    assert workers * worker_resources.gpus_per_worker * worker_resources.max_concurrent <= node_resources.get("GPU", 0)


@pytest.mark.parametrize(
    ("workers", "gpus_per_worker", "message"),
    [
        (2, 0.5, r"search\.gpus_per_worker: below 1 requires search\.workers=1, not 2"),
        (1, 1.5, r"search\.gpus_per_worker: must be a whole number above 1"),
        (2, 4.0, r"search\.gpus_per_worker: search\.workers=2 need 8 GPUs, .* 4 \(value 4\)"),
        (1, 8.0, r"search\.gpus_per_worker: search\.workers=1 need 8 GPUs, .* 4 \(value 8\)"),
    ],
)
def test_unavailable_gpus_of_a_trial_are_rejected(monkeypatch, workers, gpus_per_worker, message):
    cluster_of(monkeypatch, {"CPU": 64, "GPU": 4})
    changes = {"search.workers": workers, "search.gpus_per_worker": gpus_per_worker}
    with pytest.raises(ConfigError, match=message):
        trial_resources_for(override(Experiment(), changes))


def test_insufficient_cluster_is_rejected(monkeypatch):
    decoded = override(Experiment(), {"data.cache_decoded": False})
    cluster_of(monkeypatch, {"CPU": 1})
    with pytest.raises(ConfigError, match=r"cluster\.workers: 1 worker and Ray Data need 2 CPUs.* 1 \(value 1\)$"):
        resources_for(decoded)
    assert resources_for(Experiment()) == WorkerResources(1, 0, 1)  # videos are decoded before the worker starts
    cluster_of(monkeypatch, {"CPU": 0.5})
    with pytest.raises(ConfigError, match=r"no node has the whole CPU.*node-0 with 0\.5 CPU"):
        resources_for(Experiment())
    cluster_of(monkeypatch, {"CPU": 8, "GPU": 2})
    with pytest.raises(ConfigError, match=r"cluster\.workers: each worker needs a GPU.*may add 2 \(value 3\)"):
        resources_for(override(Experiment(), {"cluster.workers": [3, 4]}))
    cluster_of(monkeypatch, {"CPU": 3, "GPU": 4})
    with pytest.raises(ConfigError, match=r"cluster\.workers: 4 workers and Ray Data need 5 CPUs.* 3 \(value 4\)$"):
        resources_for(override(decoded, {"cluster.workers": 4}))
    with pytest.raises(ConfigError, match=r"cluster\.workers: 4 workers need 4 CPUs.* 3 \(value 4\)$"):
        resources_for(override(Experiment(), {"cluster.workers": 4}))


def test_local_folder_is_rejected_on_a_growing_cluster_without_shared_storage(monkeypatch, tmp_path):
    cluster_of(monkeypatch, {"CPU": 8}, groups=((0, {"CPU": 8}), (3, {"CPU": 4})))
    local = override(Experiment(), {"storage": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"storage: the cluster has, or may grow to, 4 nodes.*shared_storage=true"):
        resources_for(local)
    elsewhere = override(Experiment(), {"storage": "s3://bucket/runs"})
    resources_for(elsewhere)
    with pytest.raises(ConfigError, match=rf"data\.root: the cluster has, or may grow to, 4 nodes.*'{tmp_path}'"):
        resources_for(override(elsewhere, {"data.root": str(tmp_path)}))
    resources_for(override(local, {"data.root": str(tmp_path), "cluster.shared_storage": True}))


@pytest.mark.parametrize("data_root", [False, True])
def test_local_folder_is_rejected_if_a_node_does_not_see_it(monkeypatch, tmp_path, data_root: bool):
    """`node-1` sees a different folder at the same path."""
    cluster_of(monkeypatch, {"CPU": 4}, nodes=2)
    folder_of_node_1 = tmp_path / "other"
    folder_of_node_1.mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")

    def ask(nodes: dict, function, path: str, *args):
        path_of_node_1 = str(folder_of_node_1 / Path(path).name)
        return {"node-0": function(path, *args), "node-1": function(path_of_node_1, *args)}

    monkeypatch.setattr(shared_storage, "VISIBILITY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(resources, "_run_on_each", ask)
    if data_root:
        field, changes = r"data\.root", {"storage": "s3://bucket/runs", "data.root": str(tmp_path / "videos")}
    else:
        field, changes = "storage", {"storage": str(tmp_path / "runs")}
    experiment = override(Experiment(), changes)
    with pytest.raises(ConfigError, match=rf"^{field}: 1 of 2 nodes .*\(node node-1: No such file"):
        resources_for(experiment)
    monkeypatch.setattr(
        resources, "_run_on_each", lambda nodes, function, *args: {name: function(*args) for name in nodes}
    )
    assert resources_for(experiment) == WorkerResources(4, 0, 1)
    assert not list((tmp_path / "videos").glob(".*"))


def test_nodes_that_the_autoscaler_may_add_count(monkeypatch):
    cluster_of(monkeypatch, {"CPU": 4}, groups=((0, {"CPU": 4}), (8, {"CPU": 16, "GPU": 1})))
    eight_workers = override(Experiment(), {"storage": "s3://bucket/runs", "cluster.workers": 8})
    assert resources_for(eight_workers) == WorkerResources(1.0, 1, 1)
    assert resources_for(override(eight_workers, {"cluster.workers": [1, 2]})) == WorkerResources(1.0, 1, 4)
    on_cpus = override(eight_workers, {"cluster.gpu": False})
    assert resources_for(on_cpus) == WorkerResources(2.0, 0, 1)  # of the head's 4 CPUs and one more node's 16
    assert resources_for(override(on_cpus, {"cluster.workers": 4})) == WorkerResources(1.0, 0, 1)  # nothing is added
    with pytest.raises(ConfigError, match=r"may add 8 \(value 9\)"):
        resources_for(override(eight_workers, {"cluster.workers": 9}))


def test_workers_may_be_a_range():
    assert (Experiment().cluster.min_workers, Experiment().cluster.max_workers) == (1, 1)
    cluster = override(Experiment(), {"cluster.workers": [1, 4]}).cluster
    assert (cluster.min_workers, cluster.max_workers) == (1, 4)
    for invalid in ([4, 1], [0, 2], [1, 2, 3], "many"):
        with pytest.raises(ConfigError, match=r"cluster"):
            override(Experiment(), {"cluster.workers": invalid})


def cluster_of(
    monkeypatch, node_resources: dict, nodes: int = 1, groups: tuple[tuple[int, dict], ...] | None = None
) -> None:
    """Fakes a cluster of equal nodes.

    Args:
        node_resources: Resources of each node.
        groups: The autoscaler's node groups: maximum number of nodes, and resources of one node.
    """
    config = autoscaler_pb2.ClusterConfig() if groups is not None else None
    for max_count, group_resources in groups or ():
        assert config is not None
        config.node_group_configs.add(max_count=max_count, resources=group_resources)
    monkeypatch.setattr(resources.state, "get_cluster_config", lambda: config)
    alive = [
        {"Alive": True, "NodeID": f"id-{number}", "NodeManagerHostname": f"node-{number}", "Resources": node_resources}
        for number in range(nodes)
    ]
    monkeypatch.setattr("ray.nodes", lambda: [*alive, {"Alive": False}])


@pytest.mark.parametrize(
    ("groups", "live", "expected"),
    [
        (None, 1, [("node-0", 4, 1, True)]),
        (((0, {"CPU": 4}), (3, {"CPU": 16, "GPU": 2})), 1, [("node-0", 4, 1, True), ("node", 16, 3, False)]),
        (((3, {"CPU": 4}),), 2, [("node-0", 4, 1, True), ("node-1", 4, 1, True), ("node", 4, 1, False)]),
        (((2, {"CPU": 4}),), 2, [("node-0", 4, 1, True), ("node-1", 4, 1, True)]),
        (((-1, {"CPU": 8}),), 1, [("node-0", 4, 1, True), ("node", 8, sys.maxsize, False)]),
    ],
)
def test_nodes_of_cluster_lists_live_nodes_and_those_that_may_be_added(monkeypatch, groups, live: int, expected):
    cluster_of(monkeypatch, {"CPU": 4}, nodes=live, groups=groups)
    nodes = [(node.name, node.cpus, node.count, node.live) for node in resources.list_nodes()]
    assert nodes == expected


def test_nodes_of_one_host_have_distinct_names(monkeypatch):
    alive = [{"Alive": True, "NodeID": letter * 8, "NodeManagerHostname": "host"} for letter in "ab"]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    assert list(resources._list_live_nodes()) == ["host-aaaaaa", "host-bbbbbb"]


def test_job_that_ray_would_kill_too_soon_gets_a_warning():
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    job = {RAY_JOB_CONFIG_JSON_ENV_VAR: "{}"}
    for environment, wait in ((job, "3"), (job | {name: "59"}, "59"), (job | {name: "1.5e3"}, "1.5e3")):
        warning = resources.stop_wait_warning(environment)
        assert warning and f"after {wait} s" in warning and f"export {name}=600 before `ray start --head`" in warning
    for environment in ({}, {name: "3"}, job | {name: "60"}, job | JOB_STOP_WAIT_ENV):
        assert resources.stop_wait_warning(environment) is None
    assert str(JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S) == resources._RAY_STOP_WAIT_S


def build_trainer(experiment: Experiment) -> planned_restarts.ElasticTorchTrainer:
    dataset: Any = FakeDataset(5, 5)
    return _build_trainer(experiment, dataset, WorkerResources(1, 0, 1), None, (), "holder")


def test_preemptions_are_bounded_and_counted_separately_from_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    changes = {"storage": str(tmp_path), "cluster.max_failures": 2, "cluster.max_preemptions": 7}
    trainer = build_trainer(override(Experiment(), changes))
    assert os.environ[PREEMPTION_POLL_INTERVAL_S_ENV_VAR] == "1.0"
    failure_config = trainer.run_config.failure_config
    assert (failure_config.max_failures, failure_config.max_preemption_failures) == (2, 7)
    assert failure_config.relax_collectives_on_preemption
    assert failure_config.preemption_grace_s == 60  # until a checkpoint has been measured
    assert any(
        isinstance(callback, planned_restarts.CheckpointBeforePreemption) for callback in trainer.run_config.callbacks
    )
    assert override(Experiment(), {"cluster.max_preemptions": 0}).cluster.max_preemptions == 0
    with pytest.raises(ConfigError, match=r"cluster\.max_preemptions"):
        override(Experiment(), {"cluster.max_preemptions": -1})


def test_workers_of_a_local_ray_have_normal_priority():
    script = "import os, ray; from giffy_ray.cluster import resources; resources.connect()\n"
    script += "print(ray.get(ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()))"
    environment = os.environ | {"RAY_ADDRESS": "local"}
    environment.pop("RAY_worker_niceness", None)
    job = subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment, stdout=subprocess.PIPE, timeout=120
    )
    assert int(job.stdout) <= os.getpriority(os.PRIO_PROCESS, 0)


def test_workers_receive_the_fingerprint_of_the_dataset():
    trainer = build_trainer(Experiment())
    assert trainer.train_loop_config is not None
    assert trainer.train_loop_config["fingerprint"] == FakeDataset.fingerprint


def train_with(monkeypatch: pytest.MonkeyPatch, tmp_path, fit) -> None:
    """Runs a training with `fit` in place of the TorchTrainer's, and with a checkpoint of the steps done so far."""
    monkeypatch.setattr(trainer_module, "_build_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(checkpoint_selection, "latest_checkpoint", lambda _: "a checkpoint of half the training")
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    train(experiment, FakeDataset(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]


def test_run_lock_lost_on_the_workers_alone_ends_the_training(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The driver may have been paused meanwhile: the latest checkpoint must not pass for the end of the training."""
    reason = "the lock of the run 'mine' is lost: it was not renewed for 30 s"
    with pytest.raises(RunLockLost, match=reason):
        train_with(monkeypatch, tmp_path, lambda: SimpleNamespace(return_value=reason))
    train_with(monkeypatch, tmp_path, lambda: SimpleNamespace(return_value=""))


def test_unreachable_storage_does_not_hide_why_the_training_failed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def fail_to_read(_: object) -> str:
        raise OSError("the bucket is unreachable")

    def fail() -> None:
        raise ray.train.TrainingFailedError("3 workers died")

    monkeypatch.setattr(RunLockWatcher, "poll", fail_to_read)
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        train_with(monkeypatch, tmp_path, fail)


def test_ray_dashboard_shows_no_password_of_a_training():
    experiment = override(Experiment(), {"tracking.uri": "http://me:hush@host:5000"})
    trainer = build_trainer(experiment)
    displayed = RunSettings._sanitize_train_loop_config(trainer.train_loop_config)
    assert displayed["fingerprint"] == FakeDataset.fingerprint
    assert "hush" not in str(displayed)
    assert trainer.train_loop_config and "hush" in trainer.train_loop_config["experiment"].get_secret_value()


def test_stop_request_that_cannot_be_written_is_retried(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In the signal handler, a storage error would end the training without a checkpoint."""
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    attempts = []

    def fail_twice(stopped_experiment: Experiment) -> None:
        attempts.append(stopped_experiment.name)
        if len(attempts) < 3:
            raise OSError("the bucket is unreachable")

    def fit() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline_s = time.monotonic() + 30
        while len(attempts) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)

    monkeypatch.setattr(trainer_module, "_STOP_POLL_S", 0.05)
    monkeypatch.setattr(trainer_module, "_has_live_worker", lambda: True)
    monkeypatch.setattr(preemption, "request_stop", fail_twice)
    monkeypatch.setattr(trainer_module, "_build_trainer", lambda *_: SimpleNamespace(fit=fit))
    with pytest.raises(SystemExit) as exit_info:
        train(experiment, FakeDataset(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert attempts == ["mine"] * 3
