"""The experiment tags that MLflow's page reads, without a browser. test_browser.py opens the page."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from giffy_ray.config import Experiment, override
from giffy_ray.tracking import ui_view
from giffy_ray.tracking.tracker import open_run, tracking_uri


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "run", "storage": str(tmp_path / "runs")})


def saved_state() -> dict:
    return json.loads(json.loads(ui_view.build_saved_view())["state"])


def test_the_view_has_curves_and_clips_in_existing_sections():
    state = saved_state()
    charts = state["compareRunCharts"]
    curves = {chart["metricKey"] for chart in charts if chart["type"] == "LINE"}
    assert {"best/val/l2_paper", "val/l2_paper", "val/psnr", "train/loss"} <= curves
    (samples,) = [chart for chart in charts if chart["type"] == "IMAGE"]
    assert (samples["imageKeys"], samples["step"]) == (["validation"], 0)  # trainings and searches log this step
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in charts} == sections
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_the_view_does_not_nest_runs():
    """The page nests runs, and folds them, if it sorts by start time. It ignores `runsExpanded` of a saved view."""
    assert saved_state()["orderByKey"] not in ("", "attributes.start_time")


def test_the_address_opens_the_view_of_a_training_experiment():
    query = dict(part.split("=") for part in ui_view.VIEW_QUERY.split("&"))
    assert query["workflowType"] == "machine_learning"
    assert f"mlflow.sharedViewState.{query['viewStateShareKey']}" == ui_view.VIEW_TAG


def test_order_of_runs():
    order = {
        "search": ui_view.format_order(1_000),
        "trial-0": ui_view.format_order(2_000, 1_000),
        "trial-1": ui_view.format_order(3_000, 1_000),
        "later": ui_view.format_order(2_500),
        "trial of later": ui_view.format_order(10_000, 2_500),
    }
    newest_first = sorted(order, key=order.__getitem__, reverse=True)
    assert newest_first == ["later", "trial of later", "search", "trial-1", "trial-0"]


def test_mlflow_lists_the_newest_search_first_and_its_trials_below_it(experiment: Experiment):
    """As the page asks for the runs of the view."""
    studies = [override(experiment, {"name": name}) for name in ("old", "new")]
    for study in studies:
        with open_run(study) as parent:
            for number in range(2):
                trial = override(study, {"name": f"{study.name}-{number}", "storage": study.run_dir})
                trial = override(trial, {"tracking.uri": tracking_uri(study)})
                open_run(trial, parent=parent.run_dir).finish()
    client = MlflowClient(tracking_uri(experiment))
    mlflow_experiment = client.get_experiment_by_name("giffy_ray")
    assert mlflow_experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    state = json.loads(json.loads(mlflow_experiment.tags[ui_view.VIEW_TAG])["state"])
    order_by = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    runs = client.search_runs([mlflow_experiment.experiment_id], order_by=[order_by])
    assert [run.info.run_name for run in runs] == ["new", "new-1", "new-0", "old", "old-1", "old-0"]


def test_a_new_view_replaces_the_stored_one(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    open_run(experiment).finish()
    monkeypatch.setattr(ui_view, "_NAME", "another name")
    open_run(experiment).finish()
    client = MlflowClient(tracking_uri(experiment))
    tags = client.get_experiment_by_name("giffy_ray").tags
    assert json.loads(tags[ui_view.VIEW_TAG])["name"] == "another name"
