"""Ray Data deals every position once, to any number of workers, from any step on, whatever is kept of the videos."""

import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from giffy_ray.config import AugmentConfig, ClipConfig, ConfigError, DataConfig, Experiment, override
from giffy_ray.data import loader
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.prepare import prepare
from giffy_ray.data.sampler import shuffled_indices
from tests.conftest import moving_video

BATCH, CLIPS = 6, 13


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "videos" / "training" / "x").mkdir(parents=True)
    for number in range(CLIPS):
        (folder / "videos" / "training" / "x" / f"{number:02}.mp4").write_bytes(moving_video(number, 20, 30))
    clip = {"clip.frames": 4, "clip.height": 8, "clip.width": 8}
    root = str(folder / "videos")
    return override(Experiment(), {**clip, "storage": str(folder), "data.root": root, "data.validation_fraction": 0.01})


@pytest.fixture(scope="module")
def store(experiment: Experiment, local_ray: None) -> ClipDataset:
    return prepare(experiment)


def dealt(store: ClipDataset, data: DataConfig, workers: int, steps: range) -> list[loader.Batch]:
    """The batches of all ranks, step by step."""
    ranks = [list(loader.batches(store, data, 3, BATCH, rank, workers, steps)) for rank in range(workers)]
    assert {len(batches) for batches in ranks} == {len(steps)}
    return [batches[step] for step in range(len(steps)) for batches in ranks]


@pytest.mark.parametrize(("workers", "first"), [(1, 0), (2, 0), (3, 5), (6, 1)])
def test_every_position_is_dealt_once_in_order(store: ClipDataset, workers: int, first: int):
    steps = range(first, first + 11)
    batches = dealt(store, DataConfig(), workers, steps)
    positions = torch.cat([batch.positions for batch in batches]).numpy()
    assert positions.tolist() == list(range(first * BATCH, (first + 11) * BATCH))
    rows = shuffled_indices(positions, store.split_indices("training"), 3)
    assert np.array_equal(torch.cat([batch.clips for batch in batches]).numpy(), store.get_clips(rows))
    assert {tuple(batch.clips.shape) for batch in batches} == {(BATCH // workers, 4, 8, 8, 3)}


def test_what_is_stored_is_dealt_where_workers_have_taken_all_cpus(store: ClipDataset):
    def first(location: str) -> list[int]:
        batch = next(loader.batches(ClipDataset(location), DataConfig(), 3, BATCH, 0, 1, range(11)))
        return batch.positions.tolist()

    worker = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(first)
    assert ray.get(worker.remote(store.location), timeout=120) == list(range(BATCH))


@pytest.mark.parametrize("keep", [True, False])
def test_without_a_store_the_same_clips_are_dealt(experiment: Experiment, store: ClipDataset, keep: bool):
    changed = override(
        experiment,
        {"data.cache_decoded": keep, "data.augment.flip": True, "data.segments.frames": 3, "data.augment.crop": 0.5},
    )
    other = prepare(changed)
    batches = dealt(other, changed.data, 2, range(2, 7))
    expected = dealt(prepare(override(changed, {"data.cache_decoded": True})), changed.data, 1, range(2, 7))
    assert torch.equal(torch.cat([b.clips for b in batches]), torch.cat([b.clips for b in expected]))
    assert torch.equal(torch.cat([b.times for b in batches]), torch.cat([b.times for b in expected]))
    assert torch.equal(torch.cat([b.positions for b in batches]), torch.cat([b.positions for b in expected]))
    for batch in batches:
        batch.clips[0] = 0  # a learner may write to what it is given


def test_a_video_that_went_bad_after_it_was_prepared_is_named(experiment: Experiment, tmp_path: Path):
    root = tmp_path / "videos"
    (root / "x").mkdir(parents=True)
    for number in range(4):
        (root / "x" / f"{number}.mp4").write_bytes(moving_video(number, 20, 30))
    changed = override(experiment, {"data.root": str(root), "data.cache_decoded": False, "storage": str(tmp_path)})
    store = prepare(changed)
    (root / "x" / "2.mp4").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"2\.mp4: gave a clip when the data set was prepared, and now: not_video"):
        store.get_clips(np.arange(len(store)))


def test_the_batch_says_what_it_holds(store: ClipDataset):
    (batch,) = dealt(store, DataConfig(augment=AugmentConfig(reverse=True)), 1, range(1))
    assert batch.clips.dtype == torch.uint8
    assert batch.times.dtype == torch.float32
    assert batch.positions.dtype == torch.int64
    assert batch.times.shape == (BATCH, 4)
    assert ClipConfig(frames=4, height=8, width=8) == store.clip


@pytest.mark.parametrize(("count", "block"), [(0, 10), (1, 10), (10, 10), (100_000, 10_000), (100_001, 10_000)])
def test_the_numbers_of_steps_are_put_as_arrays(monkeypatch: pytest.MonkeyPatch, count: int, block: int):
    """Ray Data takes 20 us for each item of a list, and a millisecond for each block."""
    monkeypatch.setattr(ray.data, "from_blocks", lambda tables: tables)
    tables: Any = loader._numbers(count, block)
    assert np.concatenate([table["item"].to_numpy() for table in tables]).tolist() == list(range(count))
    assert len(tables) == max(1, -(-count // block))


class Doubler:
    """A mapper; what it does first takes longest, so that results would come in another order than the rows."""

    def __init__(self, refuses: int | None):
        self.refuses = refuses

    def __call__(self, rows: np.ndarray) -> list[tuple[int, int]]:
        if self.refuses in rows:
            raise ConfigError(f"evaluate.clips: no row {self.refuses}")
        time.sleep(0.3 if 0 in rows else 0)
        return [(int(row), os.getpid()) for row in rows]


def test_rows_are_mapped_in_order_by_all_actors_and_errors_are_those_of_the_mapper(
    local_ray: None, capfd: pytest.CaptureFixture
):
    rows = np.arange(11) * 2
    make = functools.partial(Doubler, None)
    here = list(loader.map_rows(rows, make, batch=3, title="doubling"))
    there = list(loader.map_rows(rows, make, batch=3, actors=2, title="doubling"))
    for results in (here, there):
        assert [[row for row, _ in result] for result in results] == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20]]
    processes = {process for result in there for _, process in result}
    assert os.getpid() not in processes
    assert capfd.readouterr().out.count("doubling: 11/11 clips") == 2
    for actors in (0, 2):
        with pytest.raises(ConfigError, match=r"evaluate\.clips: no row 8"):
            list(loader.map_rows(rows, functools.partial(Doubler, 8), batch=3, actors=actors, title="doubling"))
