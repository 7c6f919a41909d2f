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
from giffy_ray.tuning.optuna_study import OptunaStudy
from giffy_ray.tuning.tables import trials_table
from giffy_ray.tuning.tuner import Study
from tests.evaluation.test_html_report import WICKED, Reader

SPACE = "{optim.lr: {log_uniform: [1e-5, 1e-1]}, model.latent: {int: [2, 64]}, model.kl_warmup_steps: {choice: [0, 9]}}"
TWO = "search.objectives={val/skill: maximize, val/blur: minimize}"


def searched(folder: Path, trials: int, *words: str) -> tuple[Experiment, Study]:
    """Trials reach 1 + latent / 128; the second fails, and of two objectives the fifth is poor in both."""
    given = [f"search.space={SPACE}", f"storage={folder}", "name=study", "search.sampler=random", "search.epochs=2"]
    study = load(None, [*given, f"search.trials={trials}", *words])
    ledger = OptunaStudy(study)
    while asked := ledger.ask():
        number, values = asked
        for epoch in (1, 2):
            value = 1 + values["model.latent"] / 64 / epoch
            named = {"val/l2_paper": value, "val/psnr": value, "val/skill": value, "val/blur": value**2}
            if number == 4:
                named |= {"val/skill": 0.0, "val/blur": 9.0}
            if number == 1:
                ledger.end(number, "RuntimeError: </script><b>out of memory")
            elif ledger.report(number, epoch, named):
                break
        ledger.end(number)
    return study, tuner._study(ledger)


def written(study: Experiment, found: Study) -> tuple[str, dict]:
    sprite = media.sprite(np.zeros((6, 16, 16, 3), np.uint8))
    reels = [
        ClipStrip("real", (sprite,)),
        ClipStrip(found.best[0].name, (sprite,)),
        ClipStrip("trial-0009", (), "it is gone"),
    ]
    text = render_study(study, found, load(None, ["clip.frames=6"]).clip, [WICKED], reels).decode()
    return text, json.loads(Reader(text).scripts[0])


def test_the_page_is_whole_html_that_needs_nothing_from_elsewhere_and_runs_no_name(tmp_path: Path):
    text, _ = written(*searched(tmp_path, 4))
    reader = Reader(text)
    assert not reader.open
    assert len(reader.scripts) == 2
    assert "alert(1)" not in reader.scripts[1]
    assert "<b>" not in text
    assert "innerHTML" not in text
    assert not re.findall(r"https?:(?!//www.w3.org/2000/svg)", text)
    assert not [tag for tag, attributes in reader.elements if {"src", "href"} & attributes.keys()]
    assert not re.findall(r"@import|url\(|{{", text)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bat\("(\w+)"\)', text)) <= set(ids)


def test_the_page_has_every_trial_with_what_became_of_it(tmp_path: Path):
    study, found = searched(tmp_path, 12, "search.grace_period=1")
    _, data = written(study, found)
    of = {trial["number"]: trial for trial in data["trials"]}
    assert sorted(of) == list(range(12))
    assert of[1]["state"] == "failed"
    assert of[1]["reached"] == []
    assert "out of memory" in of[1]["ended"]
    reached = [trial["reached"][0] for trial in data["trials"] if trial["reached"]]
    assert reached == sorted(reached)
    assert data["trials"][-1]["number"] == 1  # what failed is last
    (best,) = [trial for trial in data["trials"] if trial["best"]]
    assert best["number"] == data["trials"][0]["number"]
    assert {trial["state"] for trial in data["trials"]} == {"whole", "cut", "failed"}
    for trial in data["trials"]:
        if trial["state"] == "cut":
            assert trial["reports"] == [[1, 1 + trial["values"]["model.latent"] / 64]]
    states = [trial["state"] for trial in data["trials"]]
    counted = f"{states.count('whole')} to their end, {states.count('cut')} ended early, 1 failed"
    assert data["about"].startswith(f"12 trials: {counted}. The best is trial-{best['number']:04}: val/l2_paper ")
    assert [field["kind"] for field in data["fields"]] == ["log_uniform", "int", "choice"]
    assert [len(reel["sprites"]) for reel in data["clips"]["reels"]] == [1, 1, 0]
    assert data["clips"]["reels"][2]["missing"] == "it is gone"


def test_what_mattered_is_what_the_objective_is_made_of(tmp_path: Path):
    _, found = searched(tmp_path, 30, "search.asha=false")
    (shares,) = found.importances.values()
    assert set(shares) == {"optim.lr", "model.latent", "model.kl_warmup_steps"}
    assert next(iter(shares)) == "model.latent"
    assert shares["model.latent"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_too_few_trials_say_nothing_of_what_mattered(tmp_path: Path):
    assert searched(tmp_path / "few", 8)[1].importances == {}  # one of them failed
    assert searched(tmp_path / "enough", 9)[1].importances


def test_several_objectives_have_their_front_marked_and_it_is_said_why_none_is_ended_early(tmp_path: Path):
    study, found = searched(tmp_path, 6, TWO)
    # Skill is to be large and blur, its square, small: of two trials each is better in one, but for the fifth.
    assert {trial.number for trial in found.best} == {0, 2, 3, 5}
    assert found.importances == {}
    assert all(trial.epochs == 2 for trial in found.trials if not trial.ended)
    _, data = written(study, found)
    assert data["objectives"] == [
        {"name": "val/skill", "better": "maximize"},
        {"name": "val/blur", "better": "minimize"},
    ]
    assert "4 are on the Pareto front" in data["about"]
    assert "successive halving (search.asha) needs one number" in data["search"]
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(trials_table(found, study.search))
    text = console.export_text()
    assert len(re.findall(r"^ front +trial-000[0235] ", text, re.MULTILINE)) == 4
    assert "4 on the Pareto front" in text
    assert "val/skill   val/blur" in text
    assert "successive halving" in text
    assert "trial-0001: RuntimeError" in text


def test_a_metric_that_is_to_be_large_is_shown_as_such(tmp_path: Path):
    study, found = searched(tmp_path, 6, "search.metric=val/psnr", "search.asha=false")
    _, data = written(study, found)
    assert data["objectives"] == [{"name": "val/psnr", "better": "maximize"}]
    reached = [trial["reached"][0] for trial in data["trials"] if trial["reached"]]
    assert reached == sorted(reached, reverse=True)
    assert len(set(reached)) > 1
    assert data["trials"][0]["best"]
    assert data["about"].count(f"val/psnr {reached[0]:.4g}") == 1
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(trials_table(found, study.search))
    lines = [line.split() for line in console.export_text().splitlines() if "trial-000" in line]
    assert lines[0][:2] == ["best", found.best[0].name]
    assert lines[0][-1] == f"{reached[0]:.4g}"


def test_a_single_objective_with_a_stated_direction_is_no_front(tmp_path: Path):
    study, found = searched(tmp_path, 3, "search.objectives={val/psnr: maximize}", "search.asha=false")
    assert len(found.best) == 1
    _, data = written(study, found)
    assert data["search"].endswith("None is ended early (search.asha=false).")
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(trials_table(found, study.search))
    assert "front" not in console.export_text().lower()
