"""The Ray Data pipelines deliver every sample once and in order, for any world size, first step and cache setting."""

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

GLOBAL_BATCH_SIZE, CLIPS = 6, 13


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "videos" / "training" / "x").mkdir(parents=True)
    for number in range(CLIPS):
        (folder / "videos" / "training" / "x" / f"{number:02}.mp4").write_bytes(moving_video(number, 20, 30))
    clip = {"clip.frames": 4, "clip.height": 8, "clip.width": 8}
    root = str(folder / "videos")
    return override(Experiment(), {**clip, "storage": str(folder), "data.root": root, "data.validation_fraction": 0.01})


@pytest.fixture(scope="module")
def dataset(experiment: Experiment, local_ray: None) -> ClipDataset:
    return prepare(experiment)


def load_batches(dataset: ClipDataset, data: DataConfig, world_size: int, steps: range) -> list[loader.Batch]:
    """The batches of all ranks, step by step."""
    ranks = [
        list(loader.iter_training_batches(dataset, data, 3, GLOBAL_BATCH_SIZE, rank, world_size, steps))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(steps)}
    return [batches[step] for step in range(len(steps)) for batches in ranks]


@pytest.mark.parametrize(("world_size", "first"), [(1, 0), (2, 0), (3, 5), (6, 1)])
def test_every_sample_is_loaded_once_in_order(dataset: ClipDataset, world_size: int, first: int):
    steps = range(first, first + 11)
    batches = load_batches(dataset, DataConfig(), world_size, steps)
    sample_indices = torch.cat([batch.sample_indices for batch in batches]).numpy()
    assert sample_indices.tolist() == list(range(first * GLOBAL_BATCH_SIZE, (first + 11) * GLOBAL_BATCH_SIZE))
    indices = shuffled_indices(sample_indices, dataset.split_indices("training"), 3)
    assert np.array_equal(torch.cat([batch.clips for batch in batches]).numpy(), dataset.get_clips(indices))
    assert {tuple(batch.clips.shape) for batch in batches} == {(GLOBAL_BATCH_SIZE // world_size, 4, 8, 8, 3)}


def test_cached_clips_are_loaded_while_workers_occupy_all_cpus(dataset: ClipDataset):
    def load_first(location: str) -> list[int]:
        batches = loader.iter_training_batches(
            ClipDataset(location), DataConfig(), 3, GLOBAL_BATCH_SIZE, 0, 1, range(11)
        )
        return next(batches).sample_indices.tolist()

    worker = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(load_first)
    assert ray.get(worker.remote(dataset.location), timeout=120) == list(range(GLOBAL_BATCH_SIZE))


@pytest.mark.parametrize("cache", [True, False])
def test_samples_do_not_depend_on_cache_or_world_size(experiment: Experiment, dataset: ClipDataset, cache: bool):
    changed = override(
        experiment,
        {"data.cache_decoded": cache, "data.augment.flip": True, "data.segments.frames": 3, "data.augment.crop": 0.5},
    )
    cached = override(changed, {"data.cache_decoded": True})
    batches = load_batches(prepare(changed), changed.data, 2, range(2, 7))
    expected = load_batches(prepare(cached), changed.data, 1, range(2, 7))
    for field in ("clips", "times", "sample_indices"):
        loaded = torch.cat([getattr(batch, field) for batch in batches])
        assert torch.equal(loaded, torch.cat([getattr(batch, field) for batch in expected]))
    for batch in batches:
        batch.clips[0] = 0  # a learner may write to its batch


def test_error_names_a_video_that_broke_after_prepare(experiment: Experiment, tmp_path: Path):
    root = tmp_path / "videos"
    (root / "x").mkdir(parents=True)
    for number in range(4):
        (root / "x" / f"{number}.mp4").write_bytes(moving_video(number, 20, 30))
    changed = override(experiment, {"data.root": str(root), "data.cache_decoded": False, "storage": str(tmp_path)})
    dataset = prepare(changed)
    (root / "x" / "2.mp4").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"2\.mp4: gave a clip when .*, but is now rejected: not_video"):
        dataset.get_clips(np.arange(len(dataset)))


def test_batch_has_documented_dtypes_and_shapes(dataset: ClipDataset):
    (batch,) = load_batches(dataset, DataConfig(augment=AugmentConfig(reverse=True)), 1, range(1))
    assert batch.clips.dtype == torch.uint8
    assert batch.times.dtype == torch.float32
    assert batch.sample_indices.dtype == torch.int64
    assert batch.times.shape == (GLOBAL_BATCH_SIZE, 4)
    assert ClipConfig(frames=4, height=8, width=8) == dataset.clip


@pytest.mark.parametrize(("count", "block_size"), [(0, 10), (1, 10), (10, 10), (100_000, 10_000), (100_001, 10_000)])
def test_step_numbers_are_stored_as_few_arrays(monkeypatch: pytest.MonkeyPatch, count: int, block_size: int):
    """Ray Data takes 20 us per item of a list and a millisecond per block."""
    monkeypatch.setattr(ray.data, "from_blocks", lambda tables: tables)
    tables: Any = loader._step_numbers(count, block_size)
    assert np.concatenate([table["item"].to_numpy() for table in tables]).tolist() == list(range(count))
    assert len(tables) == max(1, -(-count // block_size))


class ProcessIdMapper:
    """A mapper whose first batch takes longest, so that results would arrive out of order."""

    def __init__(self, refused_index: int | None):
        self.refused_index = refused_index

    def __call__(self, indices: np.ndarray) -> list[tuple[int, int]]:
        if self.refused_index in indices:
            raise ConfigError(f"evaluate.clips: no index {self.refused_index}")
        time.sleep(0.3 if 0 in indices else 0)
        return [(int(index), os.getpid()) for index in indices]


def test_map_batches_with_models_keeps_order_and_raises_the_mappers_error(
    local_ray: None, capfd: pytest.CaptureFixture
):
    indices = np.arange(11) * 2
    make_mapper = functools.partial(ProcessIdMapper, None)
    local = list(loader.map_batches_with_models(indices, make_mapper, batch_size=3, title="mapping"))
    remote = list(loader.map_batches_with_models(indices, make_mapper, batch_size=3, actors=2, title="mapping"))
    for results in (local, remote):
        mapped = [[index for index, _ in result] for result in results]
        assert mapped == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20]]
    processes = {process for result in remote for _, process in result}
    assert os.getpid() not in processes
    assert capfd.readouterr().out.count("mapping: 11/11 clips") == 2
    make_failing = functools.partial(ProcessIdMapper, 8)
    for actors in (0, 2):
        with pytest.raises(ConfigError, match=r"evaluate\.clips: no index 8"):
            list(loader.map_batches_with_models(indices, make_failing, batch_size=3, actors=actors, title="mapping"))
