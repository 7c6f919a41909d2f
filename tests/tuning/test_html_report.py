"""The page and the table of a study."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from giffy_ray.config import Experiment, load
from giffy_ray.core import media
from giffy_ray.tuning import tuner
from giffy_ray.tuning.html_report import ClipStrip, render_study
from giffy_ray.tuning.independent_trials import IndependentTrials
from giffy_ray.tuning.tables import trials_table
from giffy_ray.tuning.tuner import Study
from tests.evaluation.test_html_report import HOSTILE_ID, PageParser

SPACE = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 64]}, model.kl_warmup_steps: {choice: [0, 9]}}"
TWO_OBJECTIVES = "search.objectives={val/skill: maximize, val/blur: minimize}"


def run_study(folder: Path, trials: int, *overrides: str) -> tuple[Experiment, Study]:
    """Runs trials whose objective is 1 + latent / 128. Trial 1 fails, and trial 4 is poor in both of two objectives."""
    common = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.sampler=random", "search.epochs=2"]
    experiment = load(None, [*common, f"search.trials={trials}", *overrides])
    source = IndependentTrials(experiment)
    while proposal := source.ask():
        number, values = proposal
        for epoch in (1, 2):
            value = 1 + values["model.latent"] / 64 / epoch
            metrics = {"val/l2_paper": value, "val/psnr": value, "val/skill": value, "val/blur": value**2}
            if number == 4:
                metrics |= {"val/skill": 0.0, "val/blur": 9.0}
            if number == 1:
                source.end(number, "RuntimeError: </script><b>out of memory")
            elif source.report(number, epoch, metrics):
                break
        source.end(number)
    return experiment, tuner.collect_study(source)


def render_page(experiment: Experiment, study: Study) -> tuple[str, dict]:
    """Returns the HTML, and the JSON in it."""
    sprite = media.encode_sprite(np.zeros((6, 16, 16, 3), np.uint8))
    strips = [
        ClipStrip("real", (sprite,)),
        ClipStrip(study.best[0].name, (sprite,)),
        ClipStrip("trial-0009", (), "it is gone"),
    ]
    html = render_study(experiment, study, load(None, ["clip.frames=6"]).clip, [HOSTILE_ID], strips).decode()
    return html, json.loads(PageParser(html).scripts[0])


def render_table(experiment: Experiment, study: Study) -> str:
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(trials_table(study, experiment.search))
    return console.export_text()


def test_page_is_valid_self_contained_html_that_escapes_names(tmp_path: Path):
    html, _ = render_page(*run_study(tmp_path, 4))
    parser = PageParser(html)
    assert not parser.open_tags
    assert len(parser.scripts) == 2
    assert "alert(1)" not in parser.scripts[1]
    assert "<b>" not in html
    assert "innerHTML" not in html
    assert not re.findall(r"https?:(?!//www.w3.org/2000/svg)", html)
    assert not [tag for tag, attributes in parser.elements if {"src", "href"} & attributes.keys()]
    assert not re.findall(r"@import|url\(|{{", html)
    ids = [attributes["id"] for _, attributes in parser.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referenced_ids = set(re.findall(r'\bbyId\("(\w+)"\)', html))
    assert referenced_ids
    assert referenced_ids <= set(ids)


def test_page_contains_every_trial_and_its_outcome(tmp_path: Path):
    experiment, study = run_study(tmp_path, 12, "search.grace_period=1")
    _, data = render_page(experiment, study)
    trials = {trial["number"]: trial for trial in data["trials"]}
    assert sorted(trials) == list(range(12))
    assert trials[1]["state"] == "failed"
    assert trials[1]["results"] == []
    assert "out of memory" in trials[1]["failure"]
    results = [trial["results"][0] for trial in data["trials"] if trial["results"]]
    assert results == sorted(results)
    assert data["trials"][-1]["number"] == 1  # failed trials are last
    (best,) = [trial for trial in data["trials"] if trial["best"]]
    assert best["number"] == data["trials"][0]["number"]
    assert {trial["state"] for trial in data["trials"]} == {"completed", "pruned", "failed"}
    for trial in data["trials"]:
        if trial["state"] == "pruned":
            assert trial["reports"] == [[1, 1 + trial["values"]["model.latent"] / 64]]
    states = [trial["state"] for trial in data["trials"]]
    counts = f"{states.count('completed')} completed, {states.count('pruned')} pruned, 1 failed"
    assert data["summary"].startswith(f"12 trials: {counts}. The best is trial-{best['number']:04}: val/l2_paper ")
    assert data["summary"].endswith(". Stop reason: search.trials=12 reached.")
    assert [field["kind"] for field in data["fields"]] == ["log_uniform", "int", "choice"]
    assert [len(strip["sprites"]) for strip in data["clips"]["strips"]] == [1, 1, 0]
    assert data["clips"]["strips"][2]["missing_reason"] == "it is gone"


def test_importances_identify_the_field_that_determines_the_objective(tmp_path: Path):
    _, study = run_study(tmp_path, 30, "search.asha=false")
    (shares,) = study.importances.values()
    assert set(shares) == {"optim.lr", "model.latent", "model.kl_warmup_steps"}
    assert next(iter(shares)) == "model.latent"
    assert shares["model.latent"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_importances_are_empty_for_too_few_trials(tmp_path: Path):
    assert run_study(tmp_path / "few", 8)[1].importances == {}  # one of the eight failed
    assert run_study(tmp_path / "enough", 9)[1].importances


def test_several_objectives_mark_the_pareto_front_and_explain_why_no_trial_is_pruned(tmp_path: Path):
    experiment, study = run_study(tmp_path, 6, TWO_OBJECTIVES)
    # Skill is maximized and blur, its square, is minimized: each trial is on the front, except trial 4.
    assert {trial.number for trial in study.best} == {0, 2, 3, 5}
    assert study.importances == {}
    assert all(trial.epochs == 2 for trial in study.trials if not trial.failure)
    _, data = render_page(experiment, study)
    assert data["objectives"] == [
        {"name": "val/skill", "direction": "maximize"},
        {"name": "val/blur", "direction": "minimize"},
    ]
    assert "Trials on the Pareto front: 4." in data["summary"]
    assert "ASHA (search.asha) compares trials by one number" in data["method"]
    table = render_table(experiment, study)
    assert len(re.findall(r"^ front +trial-000[0235] ", table, re.MULTILINE)) == 4
    assert "4 on the Pareto front" in table
    assert "val/skill   val/blur" in table
    assert "No trial is pruned: ASHA (search.asha)" in " ".join(table.split())
    assert "trial-0001: RuntimeError" in table


def test_maximized_metric_ranks_large_values_first(tmp_path: Path):
    experiment, study = run_study(tmp_path, 6, "search.metric=val/psnr", "search.asha=false")
    _, data = render_page(experiment, study)
    assert data["objectives"] == [{"name": "val/psnr", "direction": "maximize"}]
    results = [trial["results"][0] for trial in data["trials"] if trial["results"]]
    assert results == sorted(results, reverse=True)
    assert len(set(results)) > 1
    assert data["trials"][0]["best"]
    assert data["summary"].count(f"val/psnr {results[0]:.4g}") == 1
    rows = [line.split() for line in render_table(experiment, study).splitlines() if "trial-000" in line]
    assert rows[0][:2] == ["best", study.best[0].name]
    assert rows[0][-1] == f"{results[0]:.4g}"


def test_single_objective_with_a_stated_direction_has_no_front(tmp_path: Path):
    experiment, study = run_study(tmp_path, 3, "search.objectives={val/psnr: maximize}", "search.asha=false")
    assert len(study.best) == 1
    _, data = render_page(experiment, study)
    assert data["method"].endswith("No trial is pruned (search.asha=false).")
    assert "front" not in render_table(experiment, study).lower()
