import contextlib
import csv
import importlib
import io
import math
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray.train
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from rich.console import Console

from giffy_ray import workflows
from giffy_ray.cluster import resources
from giffy_ray.cluster.resources import WorkerResources
from giffy_ray.config import ClipConfig, ConfigError, Experiment, override
from giffy_ray.data import prepare as preparing
from giffy_ray.data.sampler import sample_rows
from giffy_ray.evaluation import metrics, report
from giffy_ray.evaluation.evaluator import Score, summarise
from giffy_ray.evaluation.report import TrainedModel, show_results
from giffy_ray.evaluation.tables import distance_table, measures_table, skill_table
from giffy_ray.inference.loading import trained_runs
from giffy_ray.models.baselines import linear
from giffy_ray.tracking.tracker import open_run, replay, tracking_uri
from giffy_ray.training import checkpoints, learners
from giffy_ray.tuning import tuner
from tests.conftest import ROOT
from tests.evaluation.test_perceptual_evaluator import Difference

CLIP = ClipConfig(frames=4, fps=2.0, height=16, width=16)


class FakeStore:
    """What an evaluation asks of a Store: a clip brightens from frame to frame, each by another step."""

    def __init__(self, folder: Path, categories: tuple[str, ...] = ("erupting", "erupting", "skiing", "skiing")):
        self.location, self.name, self.clip = str(folder), "filmed", CLIP
        self.categories = list(categories)
        self.ids = [f"{category}/{row}.mp4" for row, category in enumerate(categories)]
        self.sources = [f"film {row}" for row in range(len(categories))]

    def split_indices(self, split: str) -> np.ndarray:
        return np.arange(len(self.ids) if split == "validation" else 0)

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        levels = np.asarray([0, 20, 20, 60])[None] + 10 * np.asarray(rows)[:, None]
        return np.broadcast_to(levels[:, :, None, None, None].astype(np.uint8), (len(rows), 4, 16, 16, 3)).copy()


class Halves:
    """Stands for a learner that makes the frames between of a level that depends on the noise."""

    latent = 2
    networks: ClassVar = {}

    def generate(self, start, end, noise, frames=None):
        between = (30 + 5 * noise.mean(1)).clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 1).expand_as(start)
        return torch.stack([start, between, between, end], dim=1)


class FakeTracker:
    def __init__(self):
        self.results, self.files = {}, {}

    def log_results(self, results):
        self.results |= results

    def log_file(self, path: Path, folder=None):
        self.files[path.name] = path.read_bytes()


def experiment(storage: object = "runs", **fields: object) -> Experiment:
    clip = {f"clip.{name}": getattr(CLIP, name) for name in ("frames", "fps", "height", "width")}
    own = {f"evaluate.{name}": value for name, value in fields.items()}
    return override(Experiment(), {"storage": str(storage), "name": "study", **clip, **own})


def test_everything_is_left_in_the_folder_and_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "set").mkdir()
    asked, tracker = experiment(tmp_path, baselines=("hold",), samples=3), FakeTracker()
    runs = [TrainedModel("mine", Halves(), asked)]  # type: ignore[arg-type]
    show_results(asked, runs, FakeStore(tmp_path / "set"), [tracker])  # type: ignore[arg-type]

    files = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    assert files.keys() == {"evaluation.csv", "evaluation.html", "contact_sheet.png", "clips.gif"}
    assert tracker.files == files
    rows = list(csv.DictReader(io.StringIO(files["evaluation.csv"].decode())))
    methods = ["linear", "hold", "mine", "mine, sample", "mine, best of 3"]
    assert [row["method"] for row in rows if row["clip_id"] == "skiing/2.mp4"] == methods
    assert {row["source"] for row in rows if row["clip_id"] == "skiing/2.mp4"} == {"film 2"}
    assert Image.open(io.BytesIO(files["clips.gif"])).n_frames == 4  # type: ignore[attr-defined]
    assert b"skiing/3.mp4" in files["evaluation.html"]

    means = {m: np.mean([float(row["l2_paper"]) for row in rows if row["method"] == m]) for m in methods}
    for method, mean in means.items():
        assert tracker.results[f"validation/{method.replace(',', '')}/l2_paper"] == pytest.approx(mean)
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in tracker.results)  # what MLflow allows everywhere
    assert tracker.results["validation/mine/won"] in (0, 0.25, 0.5, 0.75, 1)
    printed = capsys.readouterr().out
    for name in [*methods, *files]:
        assert name in printed
    assert max(map(len, printed.splitlines()[:-4])) <= 110


def test_what_trained_networks_see_is_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.jit.script(Difference()).save(str(tmp_path / "network"))
    asked = experiment(
        tmp_path, baselines=("hold",), perceptual=("lpips",), weights={"lpips": str(tmp_path / "network")}
    )
    tracker = FakeTracker()
    show_results(asked, [], FakeStore(tmp_path), [tracker])  # type: ignore[arg-type]
    # The frames between are 20, 20 above the start, which the nearest end is 20 below and 40 above.
    assert tracker.results["validation/hold/lpips"] == pytest.approx(2 * (20 + 40) / 2 / 255, rel=1e-4)
    printed = capsys.readouterr().out
    assert "4 clips, through trained networks" in printed
    assert re.search(r"hold +0\.2353", printed)


def test_an_evaluation_of_some_clips_says_of_how_many(tmp_path: Path, capsys: pytest.CaptureFixture):
    store: Any = FakeStore(tmp_path, ("erupting",) * 9)
    asked = experiment(tmp_path, baselines=("hold",), clips=5)
    show_results(asked, [], store, [])
    rows = csv.DictReader(io.StringIO((tmp_path / "study" / "evaluation.csv").read_text()))
    assert [row["clip_id"] for row in rows if row["method"] == "hold"] == [
        store.ids[row] for row in sample_rows(store, "validation", 5)
    ]
    printed = " ".join(capsys.readouterr().out.split())  # titles are as narrow as their tables
    assert "l2 of 5 of 9 validation clips" in printed
    assert re.search(r"95 % interval of the means over all, by source video: ±0\.\d+ at most", printed)
    assert "5 of 9 clips; means" in printed
    assert b"5 of 9 clips of 4 frames" in (tmp_path / "study" / "evaluation.html").read_bytes()


def test_a_split_without_clips_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluate\.split: there are no such clips in .*'test'"):
        show_results(experiment(tmp_path, split="test"), [], FakeStore(tmp_path), [])  # type: ignore[arg-type]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Experiment]:
    """Location of a checkpoint -> the experiment in it; what is not there is not found."""
    known: dict[str, Experiment] = {}

    def load(location: str):
        if location not in known:
            raise FileNotFoundError(f"{location}: not a checkpoint (it has no experiment.yaml)")
        return Halves(), known[location]

    monkeypatch.setattr(checkpoints, "load", load)
    return known


def checkpoint_of(storage: Path, run: str) -> str:
    folder = storage / run / "checkpoint_1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"files": {}}')
    return str(folder)


def test_runs_are_found_by_name_or_by_where_they_lie(stored: dict[str, Experiment], tmp_path: Path):
    for run in ("study", "older"):
        stored[checkpoint_of(tmp_path, run)] = experiment()
    names = ("older", "s3://bucket/mine/checkpoint_7", "s3://bucket/published/")
    stored |= dict.fromkeys(names[1:], experiment())
    assert [run.name for run in trained_runs(experiment(tmp_path, runs=names), CLIP)] == ["older", "mine", "published"]
    assert [run.name for run in trained_runs(experiment(tmp_path), CLIP)] == ["cvae"]  # the run called study


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("nowhere",), r"evaluate\.runs: .*no whole checkpoint in .*nowhere.*\(value 'nowhere'\)"),
        (("s3://bucket/nothing",), r"evaluate\.runs: s3://bucket/nothing: not a checkpoint.*\(value 's3"),
        (("..",), r"evaluate\.runs: name: .*\(value '\.\.'\)"),
        (("older", "older"), r"evaluate\.runs: another method or run is called that too \(value 'older'\)"),
        (("hold",), r"evaluate\.runs: another method or run is called that too \(value 'hold'\)"),
        (("larger",), r"evaluate\.runs: larger was trained with clip\.height=32 and cannot.*clip\.height=16"),
        (("longer",), r"evaluate\.runs: longer was trained with clip\.frames=30 and cannot.*clip\.frames=4"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    stored: dict[str, Experiment], tmp_path: Path, runs: tuple[str, ...], message: str
):
    for run in ("older", "hold"):
        stored[checkpoint_of(tmp_path, run)] = experiment()
    stored[checkpoint_of(tmp_path, "maximize")] = override(experiment(), {"clip.height": 32})
    stored[checkpoint_of(tmp_path, "longer")] = override(experiment(), {"clip.frames": 30})
    with pytest.raises(ConfigError, match=message):
        trained_runs(experiment(tmp_path, runs=runs), CLIP)


@pytest.mark.parametrize("size", [{"clip.height": 32}, {"clip.frames": 30}, {"clip.frames": 3, "clip.width": 24}])
def test_between_makes_clips_of_the_size_and_length_that_are_asked_for(
    size: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = {
        "model.kind": "between",
        "model.widths": (2, 2, 2),
        "model.adversarial_weight": 0.1,
        "optim.ema_decay": 0.5,
    }
    trained = override(experiment(), model | {"model.discriminator_widths": (2, 2, 2)})
    learner = learners.build(trained, torch.device("cpu"))
    for weight in learner.networks["between_average"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    monkeypatch.setattr(checkpoints, "load", lambda _: (learner, trained))
    asked = override(experiment(tmp_path, runs=("published/mine",)), size)
    (run,) = trained_runs(asked, asked.clip)
    clip = asked.clip
    start, end = torch.randint(0, 256, (2, 2, clip.height, clip.width, 3), dtype=torch.uint8)
    made = run.learner.generate(start, end, torch.zeros(2, run.learner.latent))
    assert made.shape == (2, clip.frames, clip.height, clip.width, 3)
    assert torch.equal(made, learner.generate(start, end, torch.zeros(2, learner.latent), frames=clip.frames))
    assert (made[:, 1:-1].float() - linear(start, end, clip.frames)[:, 1:-1].float()).abs().max() > 1  # by the weights
    odd = override(asked, {"clip.height": 20})
    with pytest.raises(
        ConfigError, match=r"evaluate\.runs: mine cannot make these clips: clip\.height: .*multiple of 8"
    ):
        trained_runs(odd, odd.clip)


def printed(*categories: str, method: str = "cvae-as-coded, best of 8") -> list[list[str]]:
    """The lines of the three tables, of clips of these categories."""
    scores = [
        Score(
            name,
            category,
            f"{category} {clip}",
            1234.5,
            20.25,
            0.5,
            1.5,
            12.25,
            1.5,
            0.75,
            100.0,
            diversity,
            f"film {clip}",
        )
        for name, diversity in (("linear", None), (method, 33.5))
        for clip, category in enumerate(categories)
    ]
    summaries = summarise(scores)
    tables = []
    store: Any = StoreOf()
    for table in (distance_table(summaries, store, "test"), skill_table(summaries, store), measures_table(summaries)):
        out = io.StringIO()
        Console(file=out, width=110).print(table)
        tables.append([line.rstrip() for line in out.getvalue().splitlines()])
    return tables


class StoreOf:
    name = "filmed"


def test_the_first_table_is_the_reports_table_2_with_its_figures_beside():
    lines, *_ = printed("skiing", "erupting", "erupting")
    heading = next(line for line in lines if "filmed-skiing" in line)
    assert heading.index("filmed-erupting") < heading.index("filmed-skiing") < heading.index("all")
    assert sum("1234 ± 0" in line for line in lines) == 2
    (cvae,) = (line for line in lines if line.strip().startswith("the report's CVAE"))
    assert cvae.split()[-6:] == ["180", "±", "110", "197", "±", "80"]
    text = " ".join(" ".join(lines).split())
    assert "not comparable" in text
    assert "red and blue were swapped" in text


def test_the_reports_figures_are_beside_its_categories_only():
    lines, *_ = printed("cats", "dogs")
    assert not [line for line in lines if "report" in line]


def test_many_categories_do_not_widen_the_table():
    lines, *_ = printed(*(f"category {number}" for number in range(30)), "category 7", "category 8")
    assert max(map(len, lines)) <= 110
    assert sum("± 0" in line for line in lines) == 2
    text = " ".join(lines)
    assert re.search(r"The largest categories; 26 more are in\s+evaluation\.html", text)
    assert len(re.findall(r"\b2 clips", text)) == 2  # the largest are among those shown


def test_the_skill_of_few_categories_has_its_interval_and_that_of_many_has_none():
    _, lines, _ = printed("erupting", "erupting", "skiing", "skiing")
    (row,) = (line for line in lines if line.strip().startswith("cvae"))
    # Of equal clips of linear interpolation and a model the skill is 0, and no clip is won.
    assert re.findall(r"(\S+ \(.*?\)) +(\d+%)", row) == [("0.00 (0.00, 0.00)", "0%")] * 3
    _, lines, _ = printed(*(f"category {number}" for number in range(30)))
    (row,) = (line for line in lines if line.strip().startswith("cvae"))
    assert re.findall(r"0\.00 +0%", row) == ["0.00   0%"] * 5
    assert max(map(len, lines)) <= 110


def test_the_third_table_is_readable_however_long_the_names_are():
    for method in ("cvae-erupting-as-coded, best of 8", "a-name-that-somebody-gave-to-a-run-of-an-experiment, sample"):
        _, _, lines = printed("erupting", "skiing", method=method)
        assert max(map(len, lines)) <= 110
        assert "…" not in "".join(lines)
        row = next(line for line in lines if "20.2" in line and "33.5" in line)
        assert row.endswith("33.5")


def job(name: str) -> Any:
    """The module of jobs/NAME.py."""
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "jobs"))


class SixFrames(FakeStore):
    """As many frames as a tiny CVAE can make."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.clip = ClipConfig(frames=6, fps=2.0, height=16, width=16)

    def get_clips(self, rows: np.ndarray) -> np.ndarray:
        return super().get_clips(rows)[:, [0, 1, 1, 2, 2, 3]]


@pytest.fixture
def run_with_checkpoints(tmp_path: Path, tiny: Experiment) -> Experiment:
    """A run whose second checkpoint has the best validation, and the fourth none."""
    asked = override(
        tiny, {"name": "study", "storage": str(tmp_path), "train.global_batch_size": 4, "evaluate.samples": 1}
    )
    for number, l2 in enumerate([math.nan, 20.0, 30.0, None]):
        folder = tmp_path / "study" / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        measured = {} if l2 is None else {"val/l2_paper": l2}
        position = checkpoints.TrainState(10 * number, measured, epoch=None if l2 is None else number)
        learner = learners.build(override(asked, {"train.seed": number}), torch.device("cpu"))
        checkpoints.Snapshot(learner, asked, position).save(folder)
    return asked


def test_of_a_run_the_best_validation_is_chosen_then_the_newest(run_with_checkpoints: Experiment):
    folder = Path(run_with_checkpoints.storage, "study")
    for chosen in (1, 2, 0, 3):  # NaN compares with nothing, and is better than nothing
        assert checkpoints.select(run_with_checkpoints) == str(folder / f"checkpoint_{chosen}")
        (folder / f"checkpoint_{chosen}" / "cvae.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="no whole checkpoint in"):
        checkpoints.select(run_with_checkpoints)


def test_after_a_training_the_network_that_is_shown_is_the_one_that_is_registered(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "set").mkdir()
    store: Any = SixFrames(tmp_path / "set")
    monkeypatch.setattr(workflows, "train", lambda *_: checkpoints.latest_checkpoint(run_with_checkpoints))
    monkeypatch.setattr(report, "log_data_set", lambda *_: None)
    workflows.train_and_show(run_with_checkpoints, store, WorkerResources(1, 0, 1))
    assert f"evaluating {tmp_path}/study/checkpoint_1 (epoch 1, val/l2_paper 20.00)" in capsys.readouterr().out

    rows = list(csv.DictReader((tmp_path / "study" / "evaluation.csv").open()))
    client = MlflowClient(tracking_uri(run_with_checkpoints))
    version = client.get_model_version_by_alias("giffy_ray", "champion")
    folder = str(version.source).rpartition("/")[2]
    registered = client.download_artifacts(str(version.run_id), f"{folder}/checkpoint")
    learner, _ = checkpoints.load(registered)
    real = torch.from_numpy(store.get_clips(np.arange(4)))
    made = learner.generate(real[:, 0], real[:, -1], torch.zeros(4, learner.latent))
    errors = [float(row["squared_error"]) for row in rows if row["method"] == "cvae"]
    assert errors == pytest.approx(metrics.squared_error(made, real).tolist())
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"


def test_an_evaluation_leaves_a_running_training_alone(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate, folder = job("evaluate"), tmp_path / "set"
    folder.mkdir()
    training = open_run(run_with_checkpoints)
    training.log_metrics({"train/loss": 1.0}, 1)
    training.flush()
    letters = sorted(Path(training.place, "tracking").rglob("*"))
    monkeypatch.setattr(resources, "resources_for", lambda experiment: None)
    monkeypatch.setattr(preparing, "prepare", lambda experiment: SixFrames(folder))
    evaluate.main(run_with_checkpoints)

    client = MlflowClient(tracking_uri(run_with_checkpoints))
    own, running = sorted(client.search_runs(["1"]), key=lambda run: run.info.status)
    assert (running.info.run_id, running.info.status) == (training.run_id, "RUNNING")
    assert "validation/cvae/psnr" not in running.data.metrics
    assert (own.info.run_name, own.info.status) == ("study-evaluation", "FINISHED")
    assert own.data.tags["mlflow.parentRunId"] == training.run_id
    assert "validation/cvae/psnr" in own.data.metrics
    assert {"evaluation.csv", "evaluation.html"} <= {item.path for item in client.list_artifacts(own.info.run_id)}
    assert (tmp_path / "study" / "evaluation.csv").exists()
    assert sorted(Path(training.place, "tracking").rglob("*")) == letters  # nobody else wrote there

    monkeypatch.setattr(report, "show_results", raising(RuntimeError("it broke")))
    with pytest.raises(RuntimeError, match="it broke"):
        evaluate.main(run_with_checkpoints)
    statuses = sorted(run.info.status for run in client.search_runs(["1"]))
    assert statuses == ["FAILED", "FINISHED", "RUNNING"]
    training.finish()
    assert replay(run_with_checkpoints) == 0


def test_a_training_whose_workers_were_killed_does_not_seem_to_run(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        open_run(run_with_checkpoints).flush()  # as a worker does, which is killed then
        raise ray.train.TrainingFailedError("3 workers died")

    monkeypatch.setattr(workflows, "train", killed)
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        workflows.train_and_show(run_with_checkpoints, SixFrames(tmp_path), WorkerResources(1, 0, 1))  # type: ignore[arg-type]
    (run,) = MlflowClient(tracking_uri(run_with_checkpoints)).search_runs(["1"])
    assert run.info.status == "FAILED"


def test_why_a_training_failed_is_said_also_where_nobody_can_be_told(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workflows, "train", raising(ray.train.TrainingFailedError("3 workers died")))
    monkeypatch.setattr(workflows, "open_run", raising(OSError("the bucket is away")))
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        workflows.train_and_show(run_with_checkpoints, SixFrames(tmp_path), WorkerResources(1, 0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raised", "status"),
    [(RuntimeError("none of 2 trials came to a value"), "FAILED"), (SystemExit(143), "KILLED")],
)
def test_a_search_that_raises_leaves_no_run_that_seems_to_run(
    run_with_checkpoints: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    status: str,
):
    tune_cvae = job("tune_cvae")
    space = {"search.space": {"optim.lr": {"log_uniform": [1e-4, 1e-2]}}, "name": "tuned"}
    searched = override(run_with_checkpoints, space)
    monkeypatch.setattr(resources, "resources_for", lambda experiment: WorkerResources(1, 0, 1))
    monkeypatch.setattr(resources, "share_of_trials", lambda experiment: WorkerResources(1, 0, 1))
    monkeypatch.setattr(preparing, "prepare", lambda experiment: SixFrames(tmp_path))
    monkeypatch.setattr(report, "log_data_set", lambda *_: None)
    monkeypatch.setattr(tuner, "claim", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(tuner, "search_claimed", raising(raised))
    with pytest.raises(type(raised)):
        tune_cvae.main(searched)
    (run,) = MlflowClient(tracking_uri(searched)).search_runs(["1"])
    assert (run.info.run_name, run.info.status) == ("tuned-study", status)


def raising(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_what_could_not_be_shown_is_refused_before_the_training(tmp_path: Path):
    (tmp_path / "text").write_text("no network")
    with pytest.raises(ConfigError, match=r"evaluate\.weights\.fid: evaluate\.perceptual does not name fid"):
        report.check_evaluation(override(Experiment(), {"evaluate.weights": {"fid": "x"}}))
    weights = {"evaluate.perceptual": ("fid",), "evaluate.weights": {"fid": str(tmp_path / "text")}}
    with pytest.raises(ConfigError, match=r"evaluate\.weights\.fid: is no TorchScript file"):
        report.check_evaluation(override(Experiment(), weights))
