"""Read back with MLflow's own client."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from giffy_ray.config import ConfigError, Experiment, flatten, from_yaml, override
from giffy_ray.tracking import Tracker, close_children, open_run, tracking_uri


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


@pytest.fixture
def client(experiment: Experiment) -> MlflowClient:
    return MlflowClient(tracking_uri(experiment))


def test_a_run_holds_the_experiment(experiment: Experiment, client: MlflowClient, tmp_path: Path):
    tracker = open_run(experiment, tags={"data.fingerprint": "abc"})
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "run"
    assert run.data.params == {name: str(value) for name, value in flatten(experiment).items()}
    assert run.data.tags["data.fingerprint"] == "abc"
    assert len(run.data.tags["mlflow.source.git.commit"]) >= 7
    yaml = client.download_artifacts(tracker.run_id, "experiment.yaml", str(tmp_path))
    assert from_yaml(Path(yaml).read_text()) == experiment


def test_a_run_that_is_opened_again_goes_on_without_doubled_steps(experiment: Experiment, client: MlflowClient):
    first = open_run(experiment)
    for step in (1, 2):
        first.log_metrics({"val/psnr": 10.0 + step}, step)
    first.finish()
    again = open_run(experiment)
    assert again.run_id == first.run_id
    for step in (2, 3):
        again.log_metrics({"val/psnr": 20.0 + step}, step)
    history = client.get_metric_history(again.run_id, "val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(1, 11.0), (2, 12.0), (3, 23.0)]
    assert client.get_run(again.run_id).info.status == "RUNNING"
    assert open_run(override(experiment, {"name": "other"})).run_id != first.run_id


def test_children_that_were_ended_from_outside_are_closed(experiment: Experiment, client: MlflowClient):
    parent = open_run(experiment)
    done, cut = (open_run(override(experiment, {"name": name}), parent=parent.run_id) for name in ("done", "cut"))
    done.finish()
    close_children(experiment, parent)
    statuses = [client.get_run(tracker.run_id).info.status for tracker in (parent, done, cut)]
    assert statuses == ["RUNNING", "FINISHED", "KILLED"]
    assert client.get_run(cut.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_an_animation_has_the_name_that_the_image_grid_looks_for(experiment: Experiment, client: MlflowClient):
    tracker = open_run(experiment)
    tracker.log_animation(lambda: b"webp", "validation", step=3)
    # MLflow's page wants both, and finds the one by the name of the other.
    small, image = (item.path for item in client.list_artifacts(tracker.run_id, "images"))
    assert image.startswith("images/validation+step+3+timestamp+")
    assert small.replace("+compressed", "") == image
    assert image.endswith(".webp")
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_other_ranks_write_nothing_and_draw_nothing(experiment: Experiment, tmp_path: Path):
    tracker = open_run(experiment, rank=1)
    tracker.log_metrics({"val/psnr": 1.0}, 1)
    tracker.log_animation(lambda: pytest.fail("drawn for nobody"), "validation", 1)
    tracker.finish()
    assert isinstance(tracker, Tracker)
    assert not (tmp_path / "runs").exists()


def test_a_remote_storage_needs_a_server(experiment: Experiment):
    remote = override(experiment, {"storage": "s3://bucket/runs"})
    with pytest.raises(ConfigError, match=r"tracking\.uri.*s3://bucket/runs"):
        tracking_uri(remote)
    assert tracking_uri(override(remote, {"tracking.uri": "http://127.0.0.1:5000"})) == "http://127.0.0.1:5000"
