import contextlib
import csv
import io
import math
import re
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
from giffy_ray.core.packaged import packaged_path
from giffy_ray.data import prepare as preparing
from giffy_ray.data.sampler import subsample_split
from giffy_ray.evaluation import metrics, report
from giffy_ray.evaluation.evaluator import Score, summarise
from giffy_ray.evaluation.report import report_evaluation
from giffy_ray.evaluation.tables import distance_table, measures_table, skill_table
from giffy_ray.inference.loading import load_trained_models
from giffy_ray.models.baselines import linear
from giffy_ray.models.sampling import TrainedModel
from giffy_ray.tracking import tracker as tracker_module
from giffy_ray.tracking.tracker import open_run, replay, tracking_uri
from giffy_ray.training import checkpoint_format, checkpoint_selection, checkpoints, learners, trainer
from giffy_ray.tuning import tuner
from tests.evaluation.test_perceptual_evaluator import FakeLpips

CLIP = ClipConfig(frames=4, fps=2.0, height=16, width=16)


class FakeDataset:
    """The parts of a ClipDataset that an evaluation uses. Clips brighten over time and with the index."""

    def __init__(self, folder: Path, categories: tuple[str, ...] = ("erupting", "erupting", "skiing", "skiing")):
        self.location = str(folder)
        self.name = "filmed"
        self.clip = CLIP
        self.categories = list(categories)
        self.ids = [f"{category}/{index}.mp4" for index, category in enumerate(categories)]
        self.sources = [f"film {index}" for index in range(len(categories))]

    def split_indices(self, split: str) -> np.ndarray:
        return np.arange(len(self.ids) if split == "validation" else 0)

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        levels = np.asarray([0, 20, 20, 60])[None] + 10 * np.asarray(indices)[:, None]
        return np.broadcast_to(levels[:, :, None, None, None].astype(np.uint8), (len(indices), 4, 16, 16, 3)).copy()


class FakeLearner:
    """Generates frames between whose grey level depends on the noise."""

    latent = 2
    networks: ClassVar = {}

    def generate(self, start, end, noise, frames=None):
        between = (30 + 5 * noise.mean(1)).clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 1).expand_as(start)
        return torch.stack([start, between, between, end], dim=1)


class FakeTracker:
    def __init__(self):
        self.results = {}
        self.files = {}

    def log_results(self, results):
        self.results |= results

    def log_file(self, path: Path, folder=None):
        self.files[path.name] = path.read_bytes()


def make_experiment(storage: object = "runs", **fields: object) -> Experiment:
    clip = {f"clip.{name}": getattr(CLIP, name) for name in ("frames", "fps", "height", "width")}
    evaluate = {f"evaluate.{name}": value for name, value in fields.items()}
    return override(Experiment(), {"storage": str(storage), "name": "study", **clip, **evaluate})


def test_evaluation_writes_the_same_files_to_the_folder_and_to_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "set").mkdir()
    experiment = make_experiment(tmp_path, baselines=("hold",), samples=3)
    tracker = FakeTracker()
    runs = [TrainedModel("mine", FakeLearner(), experiment)]  # type: ignore[arg-type]
    report_evaluation(experiment, runs, FakeDataset(tmp_path / "set"), [tracker])  # type: ignore[arg-type]

    files = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    assert files.keys() == {"evaluation.csv", "evaluation.html", "contact_sheet.png", "clips.gif"}
    assert tracker.files == files
    rows = list(csv.DictReader(io.StringIO(files["evaluation.csv"].decode())))
    methods = ["linear", "hold", "mine", "mine, sample", "mine, best of 3"]
    assert [row["method"] for row in rows if row["clip_id"] == "skiing/2.mp4"] == methods
    assert {row["source"] for row in rows if row["clip_id"] == "skiing/2.mp4"} == {"film 2"}
    assert Image.open(io.BytesIO(files["clips.gif"])).n_frames == 4  # type: ignore[attr-defined]
    assert b"skiing/3.mp4" in files["evaluation.html"]

    for method in methods:
        mean = np.mean([float(row["l2_paper"]) for row in rows if row["method"] == method])
        assert tracker.results[f"validation/{method.replace(',', '')}/l2_paper"] == pytest.approx(mean)
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in tracker.results)  # allowed by MLflow on all systems
    assert tracker.results["validation/mine/win_rate"] in (0, 0.25, 0.5, 0.75, 1)
    printed = capsys.readouterr().out
    for name in [*methods, *files]:
        assert name in printed
    assert max(map(len, printed.splitlines()[:-4])) <= 110


def test_perceptual_metrics_have_a_separate_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.jit.script(FakeLpips()).save(str(tmp_path / "network"))
    experiment = make_experiment(
        tmp_path, baselines=("hold",), perceptual=("lpips",), weights={"lpips": str(tmp_path / "network")}
    )
    tracker = FakeTracker()
    report_evaluation(experiment, [], FakeDataset(tmp_path), [tracker])  # type: ignore[arg-type]
    # The frames between are at 20; the closer end is 20 below the first of them, and 40 above the second.
    assert tracker.results["validation/hold/lpips"] == pytest.approx(2 * (20 + 40) / 2 / 255, rel=1e-4)
    printed = " ".join(capsys.readouterr().out.split())  # titles wrap at the width of their tables
    assert "4 clips, metrics of pretrained networks" in printed
    assert re.search(r"hold +0\.2353", printed)


def test_partial_evaluation_states_the_size_of_the_split(tmp_path: Path, capsys: pytest.CaptureFixture):
    dataset: Any = FakeDataset(tmp_path, ("erupting",) * 9)
    report_evaluation(make_experiment(tmp_path, baselines=("hold",), clips=5), [], dataset, [])
    rows = csv.DictReader(io.StringIO((tmp_path / "study" / "evaluation.csv").read_text()))
    assert [row["clip_id"] for row in rows if row["method"] == "hold"] == [
        dataset.ids[index] for index in subsample_split(dataset, "validation", 5)
    ]
    printed = " ".join(capsys.readouterr().out.split())  # titles wrap at the width of their tables
    assert "l2 of 5 of 9 validation clips" in printed
    assert re.search(r"95 % interval of the means over all, by source video: ±0\.\d+ at most", printed)
    assert "5 of 9 clips; means" in printed
    assert b"5 of 9 clips of 4 frames" in (tmp_path / "study" / "evaluation.html").read_bytes()


def test_evaluation_rejects_a_split_without_clips(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluate\.split: .* has no clips of this split.*'test'"):
        report_evaluation(make_experiment(tmp_path, split="test"), [], FakeDataset(tmp_path), [])  # type: ignore[arg-type]


@pytest.fixture
def experiments_by_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Experiment]:
    """Checkpoint path -> its experiment; any other path has no checkpoint."""
    experiments: dict[str, Experiment] = {}

    def load(location: str):
        if location not in experiments:
            raise FileNotFoundError(f"{location}: not a checkpoint (it has no experiment.yaml)")
        return FakeLearner(), experiments[location]

    monkeypatch.setattr(checkpoint_format, "load_learner", load)
    return experiments


def create_checkpoint(storage: Path, run: str) -> str:
    folder = storage / run / "checkpoint_1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"files": {}}')
    return str(folder)


def test_runs_are_loaded_by_name_or_path(experiments_by_checkpoint: dict[str, Experiment], tmp_path: Path):
    for run in ("study", "older"):
        experiments_by_checkpoint[create_checkpoint(tmp_path, run)] = make_experiment()
    names = ("older", "s3://bucket/mine/checkpoint_7", "s3://bucket/published/")
    experiments_by_checkpoint |= dict.fromkeys(names[1:], make_experiment())
    assert [run.name for run in load_trained_models(make_experiment(tmp_path, runs=names), CLIP)] == [
        "older",
        "mine",
        "published",
    ]
    assert [run.name for run in load_trained_models(make_experiment(tmp_path), CLIP)] == ["cvae"]  # the run named study


def test_a_run_is_preferred_to_a_pretrained_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[str] = []

    def load(location: str):
        loaded.append(location)
        return FakeLearner(), make_experiment()

    monkeypatch.setattr(checkpoint_format, "load_learner", load)
    experiment = make_experiment(tmp_path, runs=("between",))
    (model,) = load_trained_models(experiment, CLIP)
    checkpoint_dir = create_checkpoint(tmp_path, "between")
    load_trained_models(experiment, CLIP)
    assert loaded == [str(packaged_path("models", "between")), checkpoint_dir]
    assert model.name == "between"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("nowhere",), r"evaluate\.runs: .*no valid checkpoint in .*nowhere.*\(value 'nowhere'\)"),
        (("s3://bucket/nothing",), r"evaluate\.runs: s3://bucket/nothing: not a checkpoint.*\(value 's3"),
        (("..",), r"evaluate\.runs: name: .*\(value '\.\.'\)"),
        (("older", "older"), r"evaluate\.runs: two runs or methods have this name; .*\(value 'older'\)"),
        (("hold",), r"evaluate\.runs: two runs or methods have this name; .*\(value 'hold'\)"),
        (("larger",), r"evaluate\.runs: larger was trained with clip\.height=32 and cannot.*clip\.height=16"),
        (("longer",), r"evaluate\.runs: longer was trained with clip\.frames=30 and cannot.*clip\.frames=4"),
    ],
)
def test_incompatible_runs_are_rejected(
    experiments_by_checkpoint: dict[str, Experiment], tmp_path: Path, runs: tuple[str, ...], message: str
):
    for run in ("older", "hold"):
        experiments_by_checkpoint[create_checkpoint(tmp_path, run)] = make_experiment()
    experiments_by_checkpoint[create_checkpoint(tmp_path, "larger")] = override(make_experiment(), {"clip.height": 32})
    experiments_by_checkpoint[create_checkpoint(tmp_path, "longer")] = override(make_experiment(), {"clip.frames": 30})
    with pytest.raises(ConfigError, match=message):
        load_trained_models(make_experiment(tmp_path, runs=runs), CLIP)


@pytest.mark.parametrize("size", [{"clip.height": 32}, {"clip.frames": 30}, {"clip.frames": 3, "clip.width": 24}])
def test_between_generates_clips_of_the_requested_size_and_length(
    size: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = {
        "model.kind": "between",
        "model.widths": (2, 2, 2),
        "model.adversarial_weight": 0.1,
        "optim.ema_decay": 0.5,
    }
    trained = override(make_experiment(), model | {"model.discriminator_widths": (2, 2, 2)})
    learner = learners.build(trained, torch.device("cpu"))
    for weight in learner.networks["between_average"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    monkeypatch.setattr(checkpoint_format, "load_learner", lambda _: (learner, trained))
    experiment = override(make_experiment(tmp_path, runs=("published/mine",)), size)
    (run,) = load_trained_models(experiment, experiment.clip)
    clip = experiment.clip
    start, end = torch.randint(0, 256, (2, 2, clip.height, clip.width, 3), dtype=torch.uint8)
    generated = run.learner.generate(start, end, torch.zeros(2, run.learner.latent))
    assert generated.shape == (2, clip.frames, clip.height, clip.width, 3)
    assert torch.equal(generated, learner.generate(start, end, torch.zeros(2, learner.latent), frames=clip.frames))
    interpolated = linear(start, end, clip.frames)
    assert (generated[:, 1:-1].float() - interpolated[:, 1:-1].float()).abs().max() > 1  # because of the weights
    odd = override(experiment, {"clip.height": 20})
    with pytest.raises(
        ConfigError, match=r"evaluate\.runs: mine cannot generate these clips: clip\.height: .*multiple of 8"
    ):
        load_trained_models(odd, odd.clip)


def print_tables(*categories: str, method: str = "cvae-as-coded, best of 8") -> list[list[str]]:
    """Returns the lines of the distance, skill and measures tables for one clip per given category."""
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
    dataset: Any = NamedDataset()
    tables = []
    for table in (
        distance_table(summaries, dataset, "test"),
        skill_table(summaries, dataset),
        measures_table(summaries),
    ):
        out = io.StringIO()
        Console(file=out, width=110).print(table)
        tables.append([line.rstrip() for line in out.getvalue().splitlines()])
    return tables


class NamedDataset:
    name = "filmed"


def test_distance_table_shows_the_papers_figures_for_its_categories():
    lines, *_ = print_tables("skiing", "erupting", "erupting")
    heading = next(line for line in lines if "filmed-skiing" in line)
    assert heading.index("filmed-erupting") < heading.index("filmed-skiing") < heading.index("all")
    assert sum("1234 ± 0" in line for line in lines) == 2
    (cvae,) = (line for line in lines if line.strip().startswith("the paper's CVAE"))
    assert cvae.split()[-6:] == ["180", "±", "110", "197", "±", "80"]
    text = " ".join(" ".join(lines).split())
    assert "not comparable" in text
    assert "red and blue were swapped" in text


def test_distance_table_omits_the_papers_figures_for_other_categories():
    lines, *_ = print_tables("cats", "dogs")
    assert not [line for line in lines if "paper" in line]


def test_tables_of_many_categories_keep_their_width():
    lines, *_ = print_tables(*(f"category {number}" for number in range(30)), "category 7", "category 8")
    assert max(map(len, lines)) <= 110
    assert sum("± 0" in line for line in lines) == 2
    text = " ".join(lines)
    assert re.search(r"The\s+largest\s+categories;\s+evaluation\.html\s+shows\s+26\s+more", text)
    assert len(re.findall(r"\b2 clips", text)) == 2  # the largest categories are shown


def test_skill_table_shows_intervals_only_for_few_categories():
    _, lines, _ = print_tables("erupting", "erupting", "skiing", "skiing")
    (row,) = (line for line in lines if line.strip().startswith("cvae"))
    # The model equals linear interpolation, so its skill and win rate are 0.
    assert re.findall(r"(\S+ \(.*?\)) +(\d+%)", row) == [("0.00 (0.00, 0.00)", "0%")] * 3
    _, lines, _ = print_tables(*(f"category {number}" for number in range(30)))
    (row,) = (line for line in lines if line.strip().startswith("cvae"))
    assert re.findall(r"0\.00 +0%", row) == ["0.00   0%"] * 5
    assert max(map(len, lines)) <= 110


def test_measures_table_fits_long_method_names():
    for method in ("cvae-erupting-as-coded, best of 8", "a-name-that-somebody-gave-to-a-run-of-an-experiment, sample"):
        _, _, lines = print_tables("erupting", "skiing", method=method)
        assert max(map(len, lines)) <= 110
        assert "…" not in "".join(lines)
        row = next(line for line in lines if "20.2" in line and "33.5" in line)
        assert row.endswith("33.5")


class SixFrames(FakeDataset):
    """Clips of a length that a tiny CVAE supports."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.clip = ClipConfig(frames=6, fps=2.0, height=16, width=16)

    def get_clips(self, indices: np.ndarray) -> np.ndarray:
        return super().get_clips(indices)[:, [0, 1, 1, 2, 2, 3]]


@pytest.fixture
def run_with_checkpoints(tmp_path: Path, tiny: Experiment) -> Experiment:
    """A run whose second checkpoint has the best validation, and whose fourth has no validation."""
    experiment = override(
        tiny, {"name": "study", "storage": str(tmp_path), "train.global_batch_size": 4, "evaluate.samples": 1}
    )
    for number, l2 in enumerate([math.nan, 20.0, 30.0, None]):
        folder = tmp_path / "study" / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        measured = {} if l2 is None else {"val/l2_paper": l2}
        state = checkpoint_format.TrainState(10 * number, measured, epoch=None if l2 is None else number)
        learner = learners.build(override(experiment, {"train.seed": number}), torch.device("cpu"))
        checkpoints.Snapshot(learner, experiment, state).save(folder)
    return experiment


def test_the_best_validated_checkpoint_is_selected_and_then_the_newest(run_with_checkpoints: Experiment):
    folder = Path(run_with_checkpoints.storage, "study")
    for number in (1, 2, 0, 3):  # NaN ranks below all scores, but above a missing validation
        assert checkpoint_selection.select_checkpoint(run_with_checkpoints) == str(folder / f"checkpoint_{number}")
        (folder / f"checkpoint_{number}" / "cvae.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="no valid checkpoint in"):
        checkpoint_selection.select_checkpoint(run_with_checkpoints)


def test_the_evaluated_checkpoint_is_the_registered_one(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "set").mkdir()
    dataset: Any = SixFrames(tmp_path / "set")
    monkeypatch.setattr(trainer, "train", lambda *_: checkpoint_selection.latest_checkpoint(run_with_checkpoints))
    monkeypatch.setattr(report, "log_dataset_report", lambda *_: None)
    workflows.train_and_evaluate(run_with_checkpoints, dataset=dataset, worker_resources=WorkerResources(1, 0, 1))
    assert f"evaluating {tmp_path}/study/checkpoint_1 (epoch 1, val/l2_paper 20.00)" in capsys.readouterr().out

    rows = list(csv.DictReader((tmp_path / "study" / "evaluation.csv").open()))
    client = MlflowClient(tracking_uri(run_with_checkpoints))
    version = client.get_model_version_by_alias("giffy_ray", "champion")
    folder = str(version.source).rpartition("/")[2]
    registered = client.download_artifacts(str(version.run_id), f"{folder}/checkpoint")
    learner, _ = checkpoint_format.load_learner(registered)
    target = torch.from_numpy(dataset.get_clips(np.arange(4)))
    generated = learner.generate(target[:, 0], target[:, -1], torch.zeros(4, learner.latent))
    errors = [float(row["squared_error"]) for row in rows if row["method"] == "cvae"]
    assert errors == pytest.approx(metrics.squared_error(generated, target).tolist())
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"


def test_evaluation_does_not_touch_the_mlflow_run_of_a_running_training(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "set"
    folder.mkdir()
    training = open_run(run_with_checkpoints)
    training.log_metrics({"train/loss": 1.0}, 1)
    training.flush()
    events = sorted(Path(training.run_dir, "tracking").rglob("*"))
    monkeypatch.setattr(resources, "resources_for", lambda experiment: None)
    monkeypatch.setattr(preparing, "prepare", lambda experiment: SixFrames(folder))
    workflows.evaluate(run_with_checkpoints)

    client = MlflowClient(tracking_uri(run_with_checkpoints))
    evaluation, running = sorted(client.search_runs(["1"]), key=lambda run: run.info.status)
    assert (running.info.run_id, running.info.status) == (training.run_id, "RUNNING")
    assert "validation/cvae/psnr" not in running.data.metrics
    assert (evaluation.info.run_name, evaluation.info.status) == ("study-evaluation", "FINISHED")
    assert evaluation.data.tags["mlflow.parentRunId"] == training.run_id
    assert "validation/cvae/psnr" in evaluation.data.metrics
    assert {"evaluation.csv", "evaluation.html"} <= {
        item.path for item in client.list_artifacts(evaluation.info.run_id)
    }
    assert (tmp_path / "study" / "evaluation.csv").exists()
    assert sorted(Path(training.run_dir, "tracking").rglob("*")) == events  # nothing else wrote there

    monkeypatch.setattr(report, "report_evaluation", raising(RuntimeError("it broke")))
    with pytest.raises(RuntimeError, match="it broke"):
        workflows.evaluate(run_with_checkpoints)
    statuses = sorted(run.info.status for run in client.search_runs(["1"]))
    assert statuses == ["FAILED", "FINISHED", "RUNNING"]
    training.finish()
    assert replay(run_with_checkpoints) == 0


def train_and_evaluate_six_frames(experiment: Experiment, folder: Path) -> None:
    dataset: Any = SixFrames(folder)
    workflows.train_and_evaluate(experiment, dataset=dataset, worker_resources=WorkerResources(1, 0, 1))


def test_a_training_with_killed_workers_is_marked_as_failed(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def train(*_: object) -> None:
        open_run(run_with_checkpoints).flush()  # like a worker that is then killed
        raise ray.train.TrainingFailedError("3 workers died")

    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        train_and_evaluate_six_frames(run_with_checkpoints, tmp_path)
    (run,) = MlflowClient(tracking_uri(run_with_checkpoints)).search_runs(["1"])
    assert run.info.status == "FAILED"


def test_a_failing_tracker_does_not_hide_why_a_training_failed(
    run_with_checkpoints: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "train", raising(ray.train.TrainingFailedError("3 workers died")))
    monkeypatch.setattr(tracker_module, "open_run", raising(OSError("the bucket is away")))
    with pytest.raises(ray.train.TrainingFailedError, match="3 workers died"):
        train_and_evaluate_six_frames(run_with_checkpoints, tmp_path)


@pytest.mark.parametrize(
    ("raised", "status"),
    [(RuntimeError("none of 2 trials completed successfully"), "FAILED"), (SystemExit(143), "KILLED")],
)
def test_a_search_that_raises_ends_its_mlflow_run(
    run_with_checkpoints: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    status: str,
):
    space = {"search.space": {"optim.lr": {"log_uniform": [1e-4, 1e-2]}}, "name": "tuned"}
    searched = override(run_with_checkpoints, space)
    monkeypatch.setattr(resources, "resources_for", lambda experiment: WorkerResources(1, 0, 1))
    monkeypatch.setattr(resources, "trial_resources_for", lambda experiment: WorkerResources(1, 0, 1))
    monkeypatch.setattr(preparing, "prepare", lambda experiment: SixFrames(tmp_path))
    monkeypatch.setattr(report, "log_dataset_report", lambda *_: None)
    monkeypatch.setattr(tuner, "lock_study", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(tuner, "run_trials", raising(raised))
    with pytest.raises(type(raised)):
        workflows.tune(searched)
    (run,) = MlflowClient(tracking_uri(searched)).search_runs(["1"])
    assert (run.info.run_name, run.info.status) == ("tuned-study", status)


def test_the_published_model_generates_clips_of_the_dataset(tmp_path: Path, tiny: Experiment):
    dataset: Any = SixFrames(tmp_path)
    model = workflows._load_published_model(tiny, dataset)
    assert model.name == "published between"
    clips = torch.from_numpy(dataset.get_clips(np.arange(2)))
    generated = model.learner.generate(clips[:, 0], clips[:, -1], torch.zeros(2, model.learner.latent))
    assert generated.shape == clips.shape


def raising(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_check_evaluation_rejects_missing_weights(tmp_path: Path):
    (tmp_path / "text").write_text("no network")
    with pytest.raises(
        ConfigError, match=r"evaluate\.weights\.fid: no metric uses this file; add fid to evaluate\.perceptual"
    ):
        report.check_evaluation(override(Experiment(), {"evaluate.weights": {"fid": "x"}}))
    weights = {"evaluate.perceptual": ("fid",), "evaluate.weights": {"fid": str(tmp_path / "text")}}
    with pytest.raises(ConfigError, match=r"evaluate\.weights\.fid: not a TorchScript file"):
        report.check_evaluation(override(Experiment(), weights))
