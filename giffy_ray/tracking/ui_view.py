"""How MLflow's page shows our runs: a view of curves and samples, for its list of saved views.

Left to itself the page draws every metric in the order of the alphabet, the samples last, each below all parameters of
its run. A saved view is a tag of the experiment that holds the page's state as JSON, as its 'Save as new view' writes
it; tests/tracking/test_browser.py opens ours in a browser.
"""

from __future__ import annotations

import json
import re
from typing import Any

TAG = "mlflow.sharedViewState.giffy_ray"  # the page's viewStateShareKey is what stands behind the last dot
# Of the address of an experiment's runs: opens them in this view.
OPENED = "workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=giffy_ray"
_NAME = "curves and samples"
_ANIMATIONS = "validation"  # as the training loop calls them
_SECTIONS = {  # columns, and height of a chart in pixels
    "Validation": (3, 320),
    "Samples": (1, 680),
    "Training": (3, 320),
}
_CURVES = {
    "val/l2_paper": "Validation",
    "val/psnr": "Validation",
    "val/skill": "Validation",
    "train/loss": "Training",
    "speed/clips_per_s": "Training",
    "speed/data_wait_fraction": "Training",
}
_TABLE = [*(f"metrics.`val/{name}`" for name in ("l2_paper", "psnr", "skill")), "params.`model.kind`"]
_KEPT = {"deleted": False, "isGenerated": False, "isReordered": False}  # else the page takes them for its own
_COLOURS = (  # far enough apart to be told from each other; MLflow's own may be three greens
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"),
)


def saved_view() -> str:
    """The value of `TAG`."""
    samples = {"type": "IMAGE", "imageKeys": [_ANIMATIONS], "step": 0, "showRunParams": False}
    charts = [_chart(name, section, _curve(name)) for name, section in _CURVES.items()]
    state = {
        "selectedColumns": _TABLE,
        "compareRunCharts": [*charts, _chart("samples", "Samples", samples)],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "columns": columns, "cardHeight": height} | _KEPT
            for name, (columns, height) in _SECTIONS.items()
        ],
        "isAccordionReordered": True,  # else the page sorts the sections
        "hideEmptyCharts": True,
    }
    return json.dumps({"name": _NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def colour(name: str) -> dict[str, str]:
    """The tag that gives a run its colour in charts: by the number that its name ends in; none for other names."""
    number = re.search(r"\d+$", name)
    return {"mlflow.runColor": _COLOURS[int(number[0]) % len(_COLOURS)]} if number else {}


def _chart(name: str, section: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"uuid": name, "metricSectionId": section, "runsCountToCompare": 10} | _KEPT | settings


def _curve(metric: str) -> dict[str, Any]:
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
