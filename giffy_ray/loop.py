"""What each worker of a training runs."""

from __future__ import annotations

import time
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode

from giffy_ray import checkpoints, learners, ranks, render
from giffy_ray.checkpoints import Position
from giffy_ray.config import Experiment, from_yaml, override
from giffy_ray.data import stream
from giffy_ray.data.deal import rows_at, slice_of
from giffy_ray.data.store import Store
from giffy_ray.evaluate import Method, learner_method
from giffy_ray.learners import Learner
from giffy_ray.listen import Listener
from giffy_ray.meter import Meter, profiler
from giffy_ray.metrics import l2_report, psnr
from giffy_ray.tracking import open_run

# Of a checkpoint that was not validated: Ray Train's memory of a run cannot hold NaN or infinity.
_UNSCORED = 1e30
SCORE = "score"  # of a checkpoint: the smaller, the longer it is kept
_SAMPLES = 6


def train_loop(settings: dict[str, Any]) -> None:
    """`settings`: the experiment as YAML, where the store is, and the place of the run that this one is shown under."""
    experiment = from_yaml(settings["experiment"])
    device, rank = ray.train.torch.get_device(), ranks.rank()
    torch.set_float32_matmul_precision("highest" if experiment.speed.precision == "float32" else "high")
    store = Store(settings["store"])
    tracker = open_run(experiment, rank, settings["parent"], {"data.fingerprint": store.fingerprint})
    train, clips = experiment.train, len(store.rows_of("training"))
    validated = validations(clips, experiment)
    last = max(validated)
    learner = learners.build(experiment, device, steps=last)
    make = learner_method(learner, train.seed)

    position = begin(learner, experiment)
    steps_done, meter = position.steps_done, Meter(position.sums, train.batch, device)
    steps = range(steps_done, last)
    batches = stream.batches(store, experiment.data, train.seed, train.batch, rank, ranks.count(), steps)
    listener = Listener(experiment, rank, device)
    if steps_done == 0:
        tracker.log_animation(lambda: samples(make, store, experiment.clip.fps), "validation", step=0)

    # ---------------------------------------------------------------------------------- the training
    stopped, profile = False, profiler(experiment.speed.profile and rank == 0, tracker.log_file)
    while steps_done < last and not stopped:
        asked_s = time.perf_counter()
        dealt = next(batches)
        meter.waited(time.perf_counter() - asked_s)
        with meter.at_first_counting_flops():
            named = learner.update(dealt.clips, dealt.times, dealt.positions)
        profile.step()
        meter.add(named, len(dealt.clips))
        if named["skipped"] and meter.skipped > train.most_skipped:
            raise RuntimeError(too_many_skipped(meter.skipped, steps_done, store, experiment))
        steps_done += 1

        stopped, warned = listener.heard()
        due = train.checkpoint_every and steps_done % train.checkpoint_every == 0
        epoch, metrics = validated.get(steps_done), {}
        if epoch is not None:
            ranks.share_buffers(learner.networks.values())
            metrics = meter.means() | validate(make, store, train.batch // ranks.count(), device)
            tracker.log_metrics(metrics, step=epoch)
            tracker.log_animation(lambda: samples(make, store, experiment.clip.fps), "validation", step=epoch)
        if epoch is not None or due or stopped or warned:
            report(learner, experiment, Position(steps_done, metrics, meter.sums()), epoch)
        if epoch is not None:
            meter.start()
    # ----------------------------------------------------------------------------------
    listener.end()
    profile.stop()
    tracker.finish("KILLED" if stopped else "FINISHED")


def validations(clips: int, experiment: Experiment) -> dict[int, int]:
    """The number of steps after which there is a validation -> the epochs that have then been seen whole.

    Batches run on across epochs. There is one after the last.
    """
    train = experiment.train
    epochs = {*range(train.validate_every, train.epochs + 1, train.validate_every), train.epochs}
    return {-(-epoch * clips // train.batch): epoch for epoch in sorted(epochs)}


def begin(learner: Learner, experiment: Experiment) -> Position:
    """Where the run of the experiment's name was cut, or its start; the learner is put in that state on all workers."""
    chosen = [checkpoints.to_resume(experiment) if ranks.rank() == 0 else None]
    location = ranks.from_first(chosen)[0]
    if location is not None:
        return checkpoints.restore(location, learner)
    start = experiment.train.start_from
    if start is not None:
        location = start if "/" in start else checkpoints.newest(override(experiment, {"name": start}))
        checkpoints.start_from(location, learner)
    return Position(0)


def report(learner: Learner, experiment: Experiment, position: Position, epoch: int | None) -> None:
    """Tells Ray Train of the metrics, with a checkpoint that is uploaded while the training goes on.

    A checkpoint between validations has no score, and Ray Train keeps it only while it is the newest.
    """
    named: dict[str, Any] = {"steps_done": position.steps_done, SCORE: position.metrics.get("val/l2_report", _UNSCORED)}
    if epoch is not None:
        named |= {"epoch": epoch, **position.metrics}
    checkpoint = None
    if ranks.rank() == 0:
        checkpoint = checkpoints.written(learner, experiment, position)
    ray.train.report(
        named,
        checkpoint=checkpoint,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=checkpoints.upload,
    )


def validate(make: Method, store: Store, share: int, device: torch.device) -> dict[str, float]:
    """Means over the validation clips, `share` at a time on each worker, which takes every workers-th clip."""
    rows = store.rows_of("validation")[ranks.rank() :: ranks.count()]
    sums = {"l2_report": 0.0, "psnr": 0.0}
    for first in range(0, len(rows), share):
        chosen = rows[first : first + share]
        real = torch.from_numpy(store.gather(chosen))
        made = make(real[:, 0], real[:, -1], [store.ids[row] for row in chosen])
        sums["l2_report"] += float(l2_report(made, real).sum())
        sums["psnr"] += float(psnr(made, real).sum())
    *totals, clips = ranks.sums([*sums.values(), len(rows)], device)
    return {f"val/{name}": total / clips for name, total in zip(sums, totals, strict=True)}


def too_many_skipped(skipped: int, step: int, store: Store, experiment: Experiment) -> str:
    train = experiment.train
    positions = slice_of(step, train.batch, ranks.rank(), ranks.count())
    ids = [store.ids[row] for row in rows_at(positions, store.rows_of("training"), train.seed)]
    return (
        f"train.most_skipped: {skipped} steps had no finite loss or gradient (value {train.most_skipped}); the last "
        f"is step {step}, with these clips on worker {ranks.rank()}: {', '.join(ids)}"
    )


def samples(make: Method, store: Store, fps: float) -> bytes:
    """Real above made, side by side and moving: the first validation clips."""
    rows = store.rows_of("validation")[:_SAMPLES]
    real = torch.from_numpy(store.gather(rows))
    made = make(real[:, 0], real[:, -1], [store.ids[row] for row in rows])
    return render.animation({"real": real.numpy(), "made": made.numpy()}, fps, "webp")
