"""How MLflow's page shows our experiments: as model training, in a saved view of curves and moving clips.

By default the page sorts all metrics by name, puts images last, and folds child runs into their parents, which hides
the curves of a search's trials. A saved view is an experiment tag that holds the state of the page as JSON, in the
format that its 'Save as new view' writes. The page ignores the unfolded and hidden runs of a view, but it nests runs
only if they are sorted by start time. So the view sorts by a tag of ours: the newest search first, then its trials.

tests/tracking/test_browser.py opens the view in a browser.
"""

from __future__ import annotations

import json
import re
from typing import Any

# The page finds a view by `viewStateShareKey`, which is the last part of the tag's name.
VIEW_TAG = "mlflow.sharedViewState.giffy_ray"
# Query of the address of an experiment's runs. MLflow 3.17 takes the kind of the experiment from `workflowType`, and a
# new browser profile would show it as a GenAI experiment, without runs.
VIEW_QUERY = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=giffy_ray"
KIND_TAG = "mlflow.experimentKind"  # what other versions of the page read instead
_KIND = "custom_model_development"
ORDER_TAG = "giffy_ray.newest_search_first"  # of a run; see format_order
ORDER_KEY = f"tags.`{ORDER_TAG}`"

_NAME = "curves and samples"
_ANIMATIONS = "validation"  # key of the clips that trainings and searches log
_SECTIONS = {  # section -> columns, height of a chart in pixels
    "Validation": (4, 320),  # in a row, so that the samples below are in sight
    "Samples": (1, 680),
    "Training": (3, 320),
}
_CURVES = {  # metric -> section
    "best/val/l2_paper": "Validation",
    "best/val/psnr": "Validation",
    "best/val/skill": "Validation",
    "val/l2_paper": "Validation",
    "val/psnr": "Validation",
    "val/skill": "Validation",
    "train/loss": "Training",
    "speed/clips_per_s": "Training",
    "speed/data_wait_fraction": "Training",
}
_TABLE_COLUMNS = [
    "metrics.`val/l2_paper`",
    "metrics.`val/psnr`",
    "metrics.`val/skill`",
    "params.`model.kind`",
]
_USER_DEFINED = {"deleted": False, "isGenerated": False, "isReordered": False}  # generated charts would be replaced
# Well separated hues; MLflow's defaults may give three trials similar greens.
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
)


def build_experiment_tags() -> dict[str, str]:
    """Returns the tags of an MLflow experiment: its kind, and the saved view."""
    return {KIND_TAG: _KIND, VIEW_TAG: build_saved_view()}


def build_saved_view() -> str:
    """Returns the value of VIEW_TAG."""
    samples = {"type": "IMAGE", "imageKeys": [_ANIMATIONS], "step": 0, "showRunParams": False}
    charts = [_build_chart(metric, section, _line_settings(metric)) for metric, section in _CURVES.items()]
    charts.append(_build_chart("samples", "Samples", samples))
    sections = []
    for name, (columns, height_px) in _SECTIONS.items():
        section = {"uuid": name, "name": name, "display": True, "columns": columns, "cardHeight": height_px}
        sections.append(section | _USER_DEFINED)
    state = {
        "orderByKey": ORDER_KEY,
        "orderByAsc": False,
        "selectedColumns": _TABLE_COLUMNS,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # keeps the order of the sections
        "hideEmptyCharts": True,
    }
    return json.dumps({"name": _NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def format_order(start_ms: int, parent_start_ms: int | None = None) -> str:
    """Returns a run's value of ORDER_TAG, in descending order of which the view lists the runs.

    Newer searches come first. Within a search the parent run leads, so that the page's limit of ten visible runs keeps
    it; its children follow, newest first.

    Args:
        start_ms: Start of the run, in milliseconds since 1970.
        parent_start_ms: Start of its parent run, if it has one.
    """
    if parent_start_ms is None:
        return f"{start_ms:013}.1"
    return f"{parent_start_ms:013}.0.{start_ms:013}"


def run_colour_tags(name: str) -> dict[str, str]:
    """Returns the tag with a run's colour in charts, which the number at the end of its name selects, or no tags."""
    number = re.search(r"\d+$", name)
    return {"mlflow.runColor": _COLOURS[int(number[0]) % len(_COLOURS)]} if number else {}


def _build_chart(name: str, section: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"uuid": name, "metricSectionId": section, "runsCountToCompare": 10} | _USER_DEFINED | settings


def _line_settings(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "lineSmoothness": 0,
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
