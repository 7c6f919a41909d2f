import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
from giffy_ray.training import checkpoints, learners, preemption, restarts
from giffy_ray.training import trainer as train_module
from giffy_ray.training.train_loop import validations
from giffy_ray.training.trainer import (
    MAY_CHANGE,
    _claim,
    _trainer,
    _warn_of_little_space,
    check,
    check_experiment,
    checkpoint_bytes,
    locked_run,
    train,
)
from giffy_ray.tuning import tuner


@pytest.mark.parametrize(("clips", "batch"), [(96, 8), (100, 8), (7, 20), (2000, 20), (5, 5)])
def test_a_validation_comes_with_the_step_that_completes_its_epoch(clips: int, batch: int):
    validated = validations(clips, override(Experiment(), {"train.global_batch_size": batch, "train.epochs": 5}))
    assert list(validated.values())[-1] == 5
    for end, epoch in validated.items():
        assert end * batch >= epoch * clips > (end - 1) * batch
    report = override(Experiment(), {"train.validate_every": 30})
    assert validations(2000, report) == {3000: 30, 6000: 60, 9000: 90, 10_000: 100}  # 100 steps an epoch


class Store:
    location, fingerprint = "the-store", "abc"

    def __init__(self, training: int, validation: int):
        self.rows = {"training": np.arange(training), "validation": np.arange(validation)}

    def split_indices(self, split: str) -> np.ndarray:
        return self.rows[split]


@pytest.mark.parametrize(
    ("changes", "store", "message"),
    [
        (
            {"train.global_batch_size": 2, "cluster.workers": 3},
            Store(5, 5),
            r"train\.global_batch_size.*cluster\.workers=3 \(value 2\)",
        ),
        ({}, Store(0, 5), "no training clips.*the-store"),
        ({}, Store(5, 0), "no validation clips.*the-store"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(changes, store, message):
    with pytest.raises(ConfigError, match=message):
        check(override(Experiment(), changes), store)
    check(Experiment(), Store(5, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["published/nothing", "nothing"])
def test_a_run_that_starts_from_what_is_not_there_is_refused_before_anything_starts(tmp_path, start: str):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine", "train.init_from": start})
    with pytest.raises(ConfigError, match=rf"train\.init_from: .*\(value '{start}'"):
        train(experiment, Store(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert not (tmp_path / "mine" / "experiment.yaml").exists()


def test_a_run_is_not_continued_with_other_clips_or_settings(tmp_path):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    store, share = Store(5, 5), WorkerResources(1, 0, 1)
    store.fingerprint = "now"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data_set").write_text("before")
    (tmp_path / "mine" / "experiment.yaml").write_text(to_yaml(experiment))
    with pytest.raises(ConfigError, match="'mine' was started with other clips than there are now in the-store"):
        train(experiment, store, share)  # type: ignore[arg-type]
    (tmp_path / "mine" / "data_set").write_text("now")
    changed = override(experiment, {"optim.lr": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr: the run 'mine' was started with 0\.0001 \(value 0\.5\)"):
        train(changed, store, share)  # type: ignore[arg-type]
    changed = override(experiment, {"model.kind": "cgan"})
    with pytest.raises(ConfigError, match=r"model\.kind: the run 'mine' was started with 'cvae' \(value 'cgan'\)"):
        train(changed, store, share)  # type: ignore[arg-type]


def test_a_run_that_starts_from_other_layers_is_refused_before_anything_starts(tiny: Experiment, tmp_path):
    there = override(tiny, {"storage": str(tmp_path), "name": "there"})
    learner = learners.build(there, torch.device("cpu"))
    snapshot = checkpoints.Snapshot(learner, there, checkpoints.TrainState(0))
    place = checkpoints.place_of_new(there)
    snapshot.write(*checkpoints.filesystem_of(place))
    ours = override(there, {"name": "mine", "train.init_from": place})
    check_experiment(ours)
    with pytest.raises(ConfigError, match=r"train\.init_from: .* is of another model: .*cvae"):
        check_experiment(override(ours, {"model.latent": 5}))


def test_a_network_of_sizes_that_no_tensor_has_is_refused():
    sizes = {"model.latent": 2**31 - 1, "model.video_hidden": 2**31 - 1}
    with pytest.raises(ConfigError, match="model: torch cannot build a cvae of these sizes"):
        check_experiment(override(Experiment(), sizes))


def test_a_training_whose_checkpoints_do_not_fit_is_refused_before_anything_starts(tmp_path, tiny, monkeypatch, capsys):
    experiment = override(tiny, {"storage": str(tmp_path), "name": "mine", "train.keep_checkpoints": 4})
    size = checkpoint_bytes(experiment)

    def with_free(free: int) -> str:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        with locked_run(experiment, Store(5, 5)):  # type: ignore[arg-type]
            _warn_of_little_space(experiment)
        return capsys.readouterr().err

    with pytest.raises(ConfigError, match=r"storage: a checkpoint of 'mine' takes about .* free some, or give another"):
        with_free(2 * size - 1)
    assert not (tmp_path / "mine" / "experiment.yaml").exists()
    assert "warning: train.keep_checkpoints: up to 7 checkpoints of" in with_free(2 * size)
    assert with_free(7 * size) == ""
    assert (tmp_path / "mine" / "data_set_location").read_text() == "the-store"


def test_a_search_whose_checkpoints_do_not_fit_says_so(tmp_path, tiny, monkeypatch, capsys):
    study = override(tiny, {"storage": str(tmp_path), "name": "mine", "search.trials": 50})
    study = override(study, {"search.space": {"optim.lr": {"log_uniform": (1e-5, 1e-3)}}})
    size = checkpoint_bytes(study)
    for free, warned in ((50 * size - 1, True), (50 * size, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with tuner.claim(study, Store(5, 5)):  # type: ignore[arg-type]
            pass
        assert ("warning: search.trials: the checkpoints of 50 trials" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("kind", ["cgan", "between", "two_stream", "direct_3d"])
def test_a_run_is_not_continued_with_another_model(tmp_path, kind: str):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    _claim(experiment, Store(5, 5), MAY_CHANGE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"model\.kind: the run 'mine' was started with 'cvae' \(value '{kind}'\)"):
        _claim(override(experiment, {"model.kind": kind}), Store(5, 5), MAY_CHANGE)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name: [", b"a_field_of_tomorrow: 1"])
def test_what_a_run_was_started_with_is_named_where_it_cannot_be_read(tmp_path, content: bytes):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    _claim(experiment, Store(5, 5), MAY_CHANGE)  # type: ignore[arg-type]
    (tmp_path / "mine" / "experiment.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"/mine/experiment\.yaml, which the run was started with: "):
        _claim(experiment, Store(5, 5), MAY_CHANGE)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [50, 200])
def test_a_cosine_schedule_cannot_be_given_another_end(tmp_path, epochs: int):
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine", "optim.schedule": "cosine"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data_set").write_text("abc")
    (tmp_path / "mine" / "experiment.yaml").write_text(to_yaml(experiment))
    message = rf"train\.epochs: the cosine schedule .* 100 epochs.*\(value {epochs}\).*train\.init_from=mine"
    with pytest.raises(ConfigError, match=message):
        train(override(experiment, {"train.epochs": epochs}), Store(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["speed.compress_gradients", "speed.sync_batch_norm"])
def test_fields_that_act_on_gpus_only_are_refused_without_one(monkeypatch: pytest.MonkeyPatch, field: str):
    cluster_of(monkeypatch, {"CPU": 8})
    with pytest.raises(ConfigError, match=rf"{field}: works on GPUs only"):
        resources_for(override(Experiment(), {field: True}))
    cluster_of(monkeypatch, {"CPU": 8, "GPU": 2})
    assert resources_for(override(Experiment(), {field: True})).gpus_per_worker == 1


@pytest.mark.parametrize(
    ("resources", "workers", "expected"),
    [
        ({"CPU": 2}, 2, (0.5, 0, 1)),
        ({"CPU": 2}, 1, (1, 0, 1)),
        ({"CPU": 16}, 2, (7, 0, 1)),
        ({"CPU": 64, "GPU": 8}, 2, (1, 1, 4)),
        ({"CPU": 64, "GPU": 8}, 8, (1, 1, 1)),
    ],
)
def test_trials_and_workers_never_take_the_cpu_of_the_data_tasks(monkeypatch, resources, workers, expected):
    cluster_of(monkeypatch, resources)
    share = resources_for(override(Experiment(), {"cluster.workers": workers, "data.cache_decoded": False}))
    assert (share.cpus_per_worker, share.gpus_per_worker, share.trainings) == expected
    assert workers * share.cpus_per_worker * share.trainings <= resources["CPU"] - 1


@pytest.mark.parametrize(
    ("resources", "workers", "of_gpu", "expected"),
    [
        ({"CPU": 64, "GPU": 8}, 1, 1.0, (1, 1, 8)),
        ({"CPU": 64, "GPU": 8}, 1, 0.25, (1, 0.25, 32)),
        ({"CPU": 64, "GPU": 4}, 1, 0.4, (1, 0.4, 8)),  # two on each: what is left of it is too little
        ({"CPU": 64, "GPU": 3}, 1, 0.1, (1, 0.1, 30)),
        ({"CPU": 64, "GPU": 8}, 1, 2.0, (1, 2, 4)),
        ({"CPU": 64, "GPU": 8}, 2, 1.0, (1, 1, 4)),
        ({"CPU": 64, "GPU": 8}, 2, 2.0, (1, 2, 2)),
        ({"CPU": 64, "GPU": 8}, 2, 4.0, (1, 4, 1)),
        ({"CPU": 5, "GPU": 8}, 2, 1.0, (1, 1, 2)),
        ({"CPU": 16}, 2, 1.0, (1, 0, 8)),
    ],
)
def test_a_trial_gets_the_gpus_that_its_workers_ask_for(monkeypatch, resources, workers, of_gpu, expected):
    cluster_of(monkeypatch, resources)
    share = trial_resources_for(override(Experiment(), {"search.workers": workers, "search.gpus_per_worker": of_gpu}))
    assert (share.cpus_per_worker, share.gpus_per_worker, share.trainings) == expected
    assert workers * share.gpus_per_worker * share.trainings <= resources.get("GPU", 0)


@pytest.mark.parametrize(
    ("workers", "of_gpu", "message"),
    [
        (2, 0.5, r"search\.gpus_per_worker=0\.5 needs search\.workers=1, not 2"),
        (1, 1.5, r"search\.gpus_per_worker must be whole above 1"),
        (2, 4.0, r"search\.gpus_per_worker: search\.workers=2 need 8 GPUs, .* 4 \(value 4\)"),
        (1, 8.0, r"search\.gpus_per_worker: search\.workers=1 need 8 GPUs, .* 4 \(value 8\)"),
    ],
)
def test_gpus_that_a_trial_cannot_get_are_refused(monkeypatch, workers, of_gpu, message):
    cluster_of(monkeypatch, {"CPU": 64, "GPU": 4})
    with pytest.raises(ConfigError, match=message):
        trial_resources_for(override(Experiment(), {"search.workers": workers, "search.gpus_per_worker": of_gpu}))


def test_a_cluster_that_cannot_do_it_is_told_so(monkeypatch):
    decoded = override(Experiment(), {"data.cache_decoded": False})
    cluster_of(monkeypatch, {"CPU": 1})
    with pytest.raises(ConfigError, match=r"cluster\.workers: 1 and Ray Data need 2 CPUs.* 1$"):
        resources_for(decoded)
    assert resources_for(Experiment()) == WorkerResources(1, 0, 1)  # videos are decoded before the worker starts
    cluster_of(monkeypatch, {"CPU": 0.5})
    with pytest.raises(ConfigError, match=r"no node has a whole CPU.*node-0 with 0\.5 CPU"):
        resources_for(Experiment())
    cluster_of(monkeypatch, {"CPU": 8, "GPU": 2})
    with pytest.raises(ConfigError, match=r"cluster\.workers: each needs a GPU.*may add 2 \(value 3\)"):
        resources_for(override(Experiment(), {"cluster.workers": [3, 4]}))
    cluster_of(monkeypatch, {"CPU": 3, "GPU": 4})
    with pytest.raises(ConfigError, match=r"cluster\.workers: 4 and Ray Data need 5 CPUs.* 3$"):
        resources_for(override(decoded, {"cluster.workers": 4}))
    with pytest.raises(ConfigError, match=r"cluster\.workers: 4 need 4 CPUs.* 3$"):
        resources_for(override(Experiment(), {"cluster.workers": 4}))


def test_a_local_folder_is_refused_where_more_nodes_may_join_unless_they_are_said_to_share_it(monkeypatch, tmp_path):
    cluster_of(monkeypatch, {"CPU": 8}, groups=((0, {"CPU": 8}), (3, {"CPU": 4})))
    local = override(Experiment(), {"storage": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"storage: the cluster has 4 nodes, or may grow .*shared_storage=true"):
        resources_for(local)
    elsewhere = override(Experiment(), {"storage": "s3://bucket/runs"})
    resources_for(elsewhere)
    with pytest.raises(ConfigError, match=rf"data\.root: the cluster has 4 nodes.*'{tmp_path}'"):
        resources_for(override(elsewhere, {"data.root": str(tmp_path)}))
    resources_for(override(local, {"data.root": str(tmp_path), "cluster.shared_storage": True}))


@pytest.mark.parametrize("data_root", [False, True])
def test_a_local_folder_is_refused_where_a_node_does_not_see_it(monkeypatch, tmp_path, data_root: bool):
    """`node-1` sees another folder under the same name."""
    cluster_of(monkeypatch, {"CPU": 4}, nodes=2)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"video")

    def ask(nodes: dict, function, place: str, *rest):
        return {"node-0": function(place, *rest), "node-1": function(str(other / Path(place).name), *rest)}

    monkeypatch.setattr(shared_storage, "VISIBLE_S", 0.05)
    monkeypatch.setattr(resources, "_ask_each", ask)
    bucket = {"storage": "s3://bucket/runs"} if data_root else {"storage": str(tmp_path / "runs")}
    asked = override(Experiment(), bucket | ({"data.root": str(tmp_path / "videos")} if data_root else {}))
    field = r"data\.root" if data_root else "storage"
    with pytest.raises(ConfigError, match=rf"^{field}: 1 of 2 nodes .*\(node node-1: No such file"):
        resources_for(asked)
    monkeypatch.setattr(
        resources, "_ask_each", lambda nodes, function, *rest: {name: function(*rest) for name in nodes}
    )
    assert resources_for(asked) == WorkerResources(4, 0, 1)
    assert not list((tmp_path / "videos").glob(".*"))


def test_what_the_autoscaler_may_add_counts(monkeypatch):
    cluster_of(monkeypatch, {"CPU": 4}, groups=((0, {"CPU": 4}), (8, {"CPU": 16, "GPU": 1})))
    eight = override(Experiment(), {"storage": "s3://bucket/runs", "cluster.workers": 8})
    assert resources_for(eight) == WorkerResources(1.0, 1, 1)
    assert resources_for(override(eight, {"cluster.workers": [1, 2]})) == WorkerResources(1.0, 1, 4)
    on_cpus = override(eight, {"cluster.gpu": False})
    assert resources_for(on_cpus) == WorkerResources(2.0, 0, 1)  # of the head's 4 CPUs and one more node's 16
    assert resources_for(override(on_cpus, {"cluster.workers": 4})) == WorkerResources(1.0, 0, 1)  # nothing is added
    with pytest.raises(ConfigError, match=r"may add 8 \(value 9\)"):
        resources_for(override(eight, {"cluster.workers": 9}))


def test_workers_may_be_a_range():
    assert (Experiment().cluster.min_workers, Experiment().cluster.max_workers) == (1, 1)
    settings = override(Experiment(), {"cluster.workers": [1, 4]}).cluster
    assert (settings.min_workers, settings.max_workers) == (1, 4)
    for wrong in ([4, 1], [0, 2], [1, 2, 3], "many"):
        with pytest.raises(ConfigError, match=r"cluster"):
            override(Experiment(), {"cluster.workers": wrong})


def cluster_of(
    monkeypatch, resources: dict, nodes: int = 1, groups: tuple[tuple[int, dict], ...] | None = None
) -> None:
    """Nodes of `resources` each. `groups`: of each kind of node that the autoscaler may add, the largest number and the
    resources of one.
    """
    config = autoscaler_pb2.ClusterConfig() if groups is not None else None
    for count, of_one in groups or ():
        assert config is not None
        config.node_group_configs.add(max_count=count, resources=of_one)
    monkeypatch.setattr(resources.state, "get_cluster_config", lambda: config)
    alive = [
        {"Alive": True, "NodeID": f"id-{number}", "NodeManagerHostname": f"node-{number}", "Resources": resources}
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
def test_nodes_are_those_that_live_and_those_that_may_be_added(monkeypatch, groups, live: int, expected):
    cluster_of(monkeypatch, {"CPU": 4}, nodes=live, groups=groups)
    found = [(node.name, node.cpus, node.count, node.live) for node in resources.nodes_of_cluster()]
    assert found == expected


def test_nodes_of_one_host_are_told_apart(monkeypatch):
    alive = [{"Alive": True, "NodeID": letter * 8, "NodeManagerHostname": "host"} for letter in "ab"]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    assert list(resources._live_nodes()) == ["host-aaaaaa", "host-bbbbbb"]


def test_a_job_that_ray_would_kill_too_soon_is_warned():
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    job = {RAY_JOB_CONFIG_JSON_ENV_VAR: "{}"}
    for environment, wait in ((job, "3"), (job | {name: "59"}, "59"), (job | {name: "1.5e3"}, "1.5e3")):
        warning = resources.stop_wait_warning(environment)
        assert warning and f"after {wait} s" in warning and f"export {name}=600 before `ray start --head`" in warning
    for environment in ({}, {name: "3"}, job | {name: "60"}, job | JOB_STOP_WAIT_ENV):
        assert resources.stop_wait_warning(environment) is None
    assert str(JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S) == resources._RAY_STOP_WAIT


def test_preemptions_are_bounded_and_counted_apart_from_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    changes = {"storage": str(tmp_path), "cluster.max_failures": 2, "cluster.max_preemptions": 7}
    trainer = _trainer(override(Experiment(), changes), Store(5, 5), WorkerResources(1, 0, 1), None, (), "us")  # type: ignore[arg-type]
    assert os.environ[PREEMPTION_POLL_INTERVAL_S_ENV_VAR] == "1.0"
    failures = trainer.run_config.failure_config
    assert (failures.max_failures, failures.max_preemption_failures) == (2, 7)
    assert failures.relax_collectives_on_preemption
    assert failures.preemption_grace_s == 60  # until a checkpoint has been measured
    assert any(isinstance(one, restarts.CheckpointBeforePreemption) for one in trainer.run_config.callbacks)
    assert override(Experiment(), {"cluster.max_preemptions": 0}).cluster.max_preemptions == 0
    with pytest.raises(ConfigError, match=r"cluster\.max_preemptions"):
        override(Experiment(), {"cluster.max_preemptions": -1})


def test_workers_of_a_ray_that_we_start_do_not_stand_back_behind_other_processes():
    asked = "import os, ray; from giffy_ray import cluster; cluster.connect()\n"
    asked += "print(ray.get(ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()))"
    alone = os.environ | {"RAY_ADDRESS": "local"}
    alone.pop("RAY_worker_niceness", None)
    told = subprocess.run([sys.executable, "-c", asked], check=True, env=alone, stdout=subprocess.PIPE, timeout=120)
    assert int(told.stdout) <= os.getpriority(os.PRIO_PROCESS, 0)


def test_workers_are_given_the_fingerprint_of_the_clips_that_they_are_to_see():
    trainer = _trainer(Experiment(), Store(5, 5), WorkerResources(1, 0, 1), None, (), "us")  # type: ignore[arg-type]
    assert trainer.train_loop_config is not None
    assert trainer.train_loop_config["fingerprint"] == Store.fingerprint


def ended(monkeypatch: pytest.MonkeyPatch, tmp_path, fit) -> None:
    """A training whose TorchTrainer is stood in for by `fit`, with a checkpoint of what it has done by then."""
    monkeypatch.setattr(train_module, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(checkpoints, "newest", lambda _: "a checkpoint of half of the training")
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    train(experiment, Store(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]


def test_a_lease_that_only_the_workers_found_to_be_lost_ends_the_training(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Its process was paused, say, and goes on: what there is must not pass for the end of the training."""
    said = "the lease of the run 'mine' is lost: it was not renewed for 30 s"
    with pytest.raises(RunLockLost, match=said):
        ended(monkeypatch, tmp_path, lambda: SimpleNamespace(return_value=said))
    ended(monkeypatch, tmp_path, lambda: SimpleNamespace(return_value=""))


def test_a_storage_that_is_away_does_not_hide_why_a_training_failed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def away(_: object) -> str:
        raise OSError("the bucket is away")

    def fail() -> None:
        raise ray.train.TrainingFailedError("3 workers died")

    monkeypatch.setattr(RunLockWatcher, "look", away)
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        ended(monkeypatch, tmp_path, fail)


def test_rays_dashboard_shows_no_password_of_a_training():
    secret = override(Experiment(), {"tracking.uri": "http://me:hush@host:5000"})
    trainer = _trainer(secret, Store(5, 5), WorkerResources(1, 0, 1), None, (), "us")  # type: ignore[arg-type]
    shown = RunSettings._sanitize_train_loop_config(trainer.train_loop_config)
    assert shown["fingerprint"] == Store.fingerprint
    assert "hush" not in str(shown)
    assert trainer.train_loop_config and "hush" in trainer.train_loop_config["experiment"].get_secret_value()


def test_a_stop_request_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In the signal handler, the storage's error would have ended the training without a checkpoint."""
    experiment = override(Experiment(), {"storage": str(tmp_path), "name": "mine"})
    tries = []

    def fail_twice(asked: Experiment) -> None:
        tries.append(asked.name)
        if len(tries) < 3:
            raise OSError("the bucket is away")

    def fit() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline_s = time.monotonic() + 30
        while len(tries) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.01)

    monkeypatch.setattr(train_module, "_LOOK_S", 0.05)
    monkeypatch.setattr(train_module, "_worker_runs", lambda: True)
    monkeypatch.setattr(preemption, "request_stop", fail_twice)
    monkeypatch.setattr(train_module, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    with pytest.raises(SystemExit) as ended:
        train(experiment, Store(5, 5), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    assert ended.value.code == 128 + signal.SIGTERM
    assert tries == ["mine"] * 3
