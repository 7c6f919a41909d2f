"""The best result so far and the best trial's clips, in the parent run of a search."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from giffy_ray.config import Experiment, override
from giffy_ray.tracking.search_progress import SearchProgress, TrialResult
from giffy_ray.tracking.tracker import Tracker, open_run, tracking_uri
from giffy_ray.tuning.independent_trials import IndependentTrials
from giffy_ray.tuning.tuner import OptunaSearcher


class RecordingTracker(Tracker):
    """Records what the search logs."""

    def __init__(self):
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}
        self.clips: dict[int, str] = {}

    def log_metrics(self, metrics, step, group="metrics"):
        self.metrics[step] = dict(metrics)

    def copy_last_animation(self, child, name, step):
        self.clips[step] = child


def results(values: dict[int, tuple[float, ...]]) -> dict[int, TrialResult]:
    return {number: TrialResult(f"trial-{number:04}", value) for number, value in values.items()}


def test_the_curve_is_the_best_of_the_trials_up_to_each_number():
    tracker = RecordingTracker()
    progress = SearchProgress(tracker, {"val/l2_paper": "minimize"})
    progress.update(results({0: (5.0,), 1: (7.0,), 2: (3.0,)}))
    assert tracker.metrics == {
        0: {"best/val/l2_paper": 5.0},
        1: {"best/val/l2_paper": 5.0},
        2: {"best/val/l2_paper": 3.0},
    }
    assert tracker.clips == {0: "trial-0000", 1: "trial-0000", 2: "trial-0002"}


def test_the_curve_waits_for_running_trials_and_skips_failed_ones():
    tracker = RecordingTracker()
    progress = SearchProgress(tracker, {"val/psnr": "maximize"})
    progress.update(results({0: (), 2: (30.0,)}))
    assert tracker.metrics == {}  # trial 0 failed, and trial 1 is running
    progress.update(results({0: (), 1: (20.0,), 2: (30.0,), 4: (40.0,)}))
    assert tracker.metrics == {1: {"best/val/psnr": 20.0}, 2: {"best/val/psnr": 30.0}}
    assert tracker.clips == {1: "trial-0001", 2: "trial-0002"}


def test_each_objective_has_a_curve_and_the_first_selects_the_clips():
    tracker = RecordingTracker()
    progress = SearchProgress(tracker, {"val/psnr": "maximize", "speed/step_ms": "minimize"})
    progress.update(results({0: (20.0, 5.0), 1: (10.0, 3.0), 2: (30.0, 9.0)}))
    assert tracker.metrics[2] == {"best/val/psnr": 30.0, "best/speed/step_ms": 3.0}
    assert tracker.clips == {0: "trial-0000", 1: "trial-0000", 2: "trial-0002"}


def test_ray_tune_can_save_the_searcher_that_holds_it():
    """A tracker has a thread, which cannot be pickled."""
    pickle.dumps(SearchProgress(RecordingTracker(), {"val/psnr": "maximize"}))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return override(Experiment(), {"name": "study", "storage": str(tmp_path / "runs")})


def test_the_searcher_updates_the_progress_when_a_trial_ends(experiment: Experiment):
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}}
    source = IndependentTrials(override(experiment, {"search.space": space, "search.asha": False}))
    tracker = RecordingTracker()
    searcher = OptunaSearcher(source, SearchProgress(tracker, source.study.objectives))
    for trial_id, value in (("a", 5.0), ("b", 1.0), ("c", 3.0)):
        number = searcher.suggest(trial_id)["number"]
        source.report(number, 1, {"val/l2_paper": value})
        assert number not in tracker.metrics
        searcher.on_trial_complete(trial_id, error=trial_id == "b")  # the result of a failed trial does not count
    assert {step: metrics["best/val/l2_paper"] for step, metrics in tracker.metrics.items()} == {0: 5.0, 1: 5.0, 2: 3.0}
    assert tracker.clips == {0: "trial-0000", 1: "trial-0000", 2: "trial-0002"}


def encode_animation(level: int) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), level + index, np.uint8)) for index in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", lossless=True, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def log_search(experiment: Experiment, values: dict[int, float]) -> str:
    """Logs a search whose trials reach these values, and returns the id of its run. Resumes a search of this name."""
    changes = {"storage": experiment.run_dir, "tracking.uri": tracking_uri(experiment)}
    with open_run(experiment) as parent:
        progress = SearchProgress(parent, {"val/psnr": "maximize"})
        for number in values:
            trial = override(experiment, {**changes, "name": f"trial-{number:04}"})
            with open_run(trial, parent=parent.run_dir) as tracker:
                tracker.log_animation(lambda: encode_animation(0), "validation", step=0)
                tracker.log_animation(lambda number=number: encode_animation(100 + number), "validation", step=1)
            progress.update(results({n: (value,) for n, value in values.items() if n <= number}))
        return parent.run_id


def test_the_parent_run_has_the_curve_and_the_last_clips_of_the_best_trial(experiment: Experiment, tmp_path: Path):
    for _ in range(2):  # the resumed search logs no step again
        run_id = log_search(experiment, {0: 20.0, 1: 10.0, 2: 30.0})
    client = MlflowClient(tracking_uri(experiment))
    history = client.get_metric_history(run_id, "best/val/psnr")
    assert [(metric.step, metric.value) for metric in history] == [(0, 20.0), (1, 20.0), (2, 30.0)]
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    paths = [item.path for item in client.list_artifacts(run_id, "images") if "+compressed" in item.path]
    assert len(paths) == 3
    for step, best in enumerate((0, 0, 2)):
        (path,) = [path for path in paths if path.startswith(f"images/validation+step+{step}+")]
        clips = Path(client.download_artifacts(run_id, path, str(tmp_path))).read_bytes()
        assert clips == encode_animation(100 + best)


def test_without_samples_the_parent_run_has_the_curve_only(experiment: Experiment):
    run_id = log_search(override(experiment, {"tracking.samples": False}), {0: 20.0})
    client = MlflowClient(tracking_uri(experiment))
    assert client.get_run(run_id).data.metrics == {"best/val/psnr": 20.0}
    assert not client.list_artifacts(run_id, "images")


def test_clips_that_cannot_be_read_do_not_end_the_search(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    def fail(_: str) -> bool:
        raise OSError("Input/output error")

    with open_run(experiment) as parent:
        monkeypatch.setattr("giffy_ray.tracking.tracker.is_file", fail)
        SearchProgress(parent, {"val/psnr": "maximize"}).update(results({0: (20.0,)}))
    client = MlflowClient(tracking_uri(experiment))
    assert client.get_run(parent.run_id).data.metrics == {"best/val/psnr": 20.0}
