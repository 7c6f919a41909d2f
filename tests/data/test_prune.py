"""Pruning removes exactly the unneeded files. A fake sandbox derives frames from the bytes of a file."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from giffy_ray.config import Experiment, override
from giffy_ray.core import run_lock
from giffy_ray.core.storage import filesystem_of, join, write_bytes, write_text
from giffy_ray.data import loader, prune, shards
from giffy_ray.data.clip_dataset import ClipDataset
from giffy_ray.data.decode import DecodedClip, RejectedVideo, SourceInfo
from giffy_ray.data.prepare import prepare
from giffy_ray.data.synthetic import dataset as synthetic_dataset

VIDEOS, BROKEN = 6, b"no video"


class FakeSandbox:
    def __init__(self, clip, limits, decoder):
        self.clip = clip

    def sample(self, video: bytes) -> DecodedClip:
        if video == BROKEN:
            raise RejectedVideo("not_video", "it says so")
        shape = (self.clip.frames, self.clip.height, self.clip.width, 3)
        frames = np.random.default_rng(list(video)).integers(256, size=shape, dtype=np.uint8)
        return DecodedClip(
            frames, np.arange(len(frames)) / self.clip.fps, 0, SourceInfo("h264", 8, 8, 30.0, 1.0, False)
        )


@pytest.fixture(autouse=True)
def fake_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: map(decode, chunks))
    monkeypatch.setattr(shards, "get_sandbox", FakeSandbox)
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 2)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for number in range(VIDEOS):
        write_bytes(f"{tmp_path}/videos/training/a/{number}.mp4", b"video %d" % number)
    fields = {"clip.frames": 4, "clip.height": 8, "clip.width": 8}
    return override(
        Experiment(), fields | {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs"), "name": "run"}
    )


def list_files(storage: str) -> dict[str, int]:
    """Path below the storage -> bytes."""
    filesystem, base = filesystem_of(storage)
    infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    return {info.path.removeprefix(base): info.size for info in infos if info.type == fs.FileType.File}


def prune_and_check(experiment: Experiment) -> dict[str, int]:
    """Removes the unneeded files and returns them. Checks that they match the plan and that planning is read-only."""
    before = list_files(experiment.storage)
    plan = prune.plan(experiment)
    assert list_files(experiment.storage) == before
    for removal in plan.removals:
        removal.remove()
    after = list_files(experiment.storage)
    removed = {name: size for name, size in before.items() if name not in after}
    assert sum(removal.files for removal in plan.removals) == len(removed)
    assert sum(removal.bytes for removal in plan.removals) == sum(removed.values())
    assert not prune.plan(experiment).removals
    return removed


def record_dataset(run: Experiment, dataset: ClipDataset) -> None:
    """Records the dataset in the folder of a run, as a training does once it holds the lease."""
    write_text(join(run.storage, run.name, "data_set"), dataset.fingerprint)
    write_text(join(run.storage, run.name, prune.DATASET_LOCATION_FILE), dataset.location)


def list_reasons(experiment: Experiment) -> dict[str, str]:
    return {removal.description: removal.reason for removal in prune.plan(experiment).removals}


def has_expected_clips(dataset: ClipDataset) -> bool:
    for index, name in enumerate(dataset.ids):
        content = (Path(dataset.root) / name).read_bytes()
        if not np.array_equal(
            dataset.get_clips(np.asarray([index]))[0], FakeSandbox(dataset.clip, None, "").sample(content).clip
        ):
            return False
    return True


def make_old(path: Path) -> None:
    old_s = time.time() - 2 * shards.STALE_S
    os.utime(path, (old_s, old_s))


def test_needed_files_stay(experiment):
    dataset = prepare(experiment)
    assert not prune_and_check(experiment) and has_expected_clips(ClipDataset(dataset.location))
    assert not list(Path(experiment.storage).glob("stores/*/jobs/*"))


def test_stores_of_other_settings_and_versions_are_removed(experiment, monkeypatch):
    others = [
        prepare(override(experiment, {"clip.height": 16})),
        prepare(override(experiment, {"data.cache_decoded": False})),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "VERSION", 2)
        old = prepare(experiment)
    dataset = prepare(experiment)
    keys = [other.location.split("/")[-3] for other in (*others, old)]
    assert list_reasons(experiment) == {
        f"store {keys[0]}": "other decode settings: height=16",
        f"store {keys[1]}": "other decode settings: cache=False",
        f"store {keys[2]}": "decoder version 2, the current version is 3",
    }
    assert {name.split("/")[2] for name in prune_and_check(experiment)} == set(keys)
    assert [path.name for path in Path(experiment.storage, "stores").iterdir()] == [dataset.decode_config.key]
    assert has_expected_clips(ClipDataset(dataset.location))


def test_shards_of_deleted_and_changed_videos_are_removed(experiment, monkeypatch):
    old = prepare(experiment)
    videos = Path(experiment.data.root, "training", "a")
    for name in ("0.mp4", "1.mp4", "2.mp4"):  # all of one shard and half of another
        (videos / name).unlink()
    (videos / "4.mp4").write_bytes(b"another video")
    dataset = prepare(experiment)
    removed = prune_and_check(experiment)
    assert [Path(name).suffix for name in sorted(removed) if "/shards/" in name].count(".u8") == 1
    assert any(old.location.rpartition("/")[2] in name for name in removed)
    assert has_expected_clips(ClipDataset(dataset.location))
    with pytest.raises(FileNotFoundError):
        ClipDataset(old.location)
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: pytest.fail("decoded again"))
    assert prepare(experiment, again=True).location == dataset.location


def test_all_listings_are_looked_up_at_once(experiment, monkeypatch):
    """Each lookup hashes all identities, so one for every listing is quadratic in the number of videos."""
    prepare(experiment)
    is_in, lookups = prune._is_in, []
    monkeypatch.setattr(prune, "_is_in", lambda column, values: lookups.append(len(column)) or is_in(column, values))
    prune.plan(experiment)
    (store,) = Path(experiment.storage, "stores").iterdir()
    assert len(shards.read_listings(str(store))) == VIDEOS // 2
    assert len(lookups) == 4
    assert min(lookups) == VIDEOS


def test_shards_of_unprepared_videos_stay(experiment, monkeypatch):
    prepare(experiment)
    videos = Path(experiment.data.root, "training", "a")
    (videos / "5.mp4").unlink()
    prune_and_check(experiment)
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: pytest.fail("decoded again"))
    assert len(prepare(experiment)) == VIDEOS - 1


def test_reject_stays_known_if_its_shard_is_removed(experiment, monkeypatch):
    videos = Path(experiment.data.root, "training", "a")
    for name, content in (("6.mp4", b"video 6"), ("7.mp4", BROKEN)):
        (videos / name).write_bytes(content)
    location = Path(prepare(experiment).location).parents[1]
    (videos / "6.mp4").unlink()
    *_, removal = prune.plan(experiment).removals  # the set and its pointer come first
    assert (removal.files, removal.bytes) == (1, 4 * 8 * 8 * 3)
    removal.remove()
    assert len(list(location.glob("shards/*.u8"))) == VIDEOS // 2
    assert shards.read_index(str(location))["reason"].to_pylist().count("not_video") == 1
    monkeypatch.setattr(loader, "decode_blocks", lambda chunks, decode: pytest.fail("decoded again"))
    assert len(prepare(experiment).rejects) == 1


def test_files_left_by_killed_jobs_are_removed(experiment):
    dataset = prepare(experiment)
    location = Path(dataset.location).parents[1]
    orphan, partial, recent_partial = (
        location / "shards" / name for name in ("0.u8", "a.u8.1.partial", "b.u8.2.partial")
    )
    left = [orphan, partial, Path(experiment.storage, ".3.partial"), location / "catalogs" / "0123456789abcdef.lock"]
    for path in (*left, recent_partial):
        path.write_bytes(b"xyz")
    for path in left[1:]:
        make_old(path)
    job = override(experiment, {"storage": str(location / "jobs"), "name": "killed"})
    write_text(run_lock.lock_path(job.run_dir), '{"renewed_s": 0}')
    left.append(Path(run_lock.lock_path(job.run_dir)))
    assert set(prune_and_check(experiment)) == {str(path).removeprefix(experiment.storage) for path in left}
    assert recent_partial.exists() and has_expected_clips(dataset)


def test_files_used_by_a_running_training_stay(experiment):
    """Its videos have changed since, and an experiment with other settings prunes."""
    dataset = prepare(experiment)
    with run_lock.run_lock(experiment.run_dir):
        record_dataset(experiment, dataset)
        other = override(experiment, {"clip.height": 16})
        prepare(other)
        shutil.rmtree(experiment.data.root)
        write_bytes(f"{experiment.data.root}/training/a/9.mp4", b"the only video now")
        assert {name.split("/")[2] for name in prune_and_check(other)} == {prune.DecodeConfig(other.clip).key}
        assert np.array_equal(
            ClipDataset(dataset.location).get_clips(np.arange(VIDEOS)), dataset.get_clips(np.arange(VIDEOS))
        )
        # A run of an older version has only the fingerprint, and a run that has just started has neither file.
        os.unlink(f"{experiment.storage}/run/{prune.DATASET_LOCATION_FILE}")
        assert not prune_and_check(other)
        os.unlink(f"{experiment.storage}/run/data_set")
        plan = prune.plan(experiment)
        assert not plan.removals
        assert plan.kept_reasons == ["everything: run is running and has not recorded its dataset yet"]
        write_text(f"{experiment.storage}/run/{prune.DATASET_LOCATION_FILE}", dataset.location)
    assert any(dataset.decode_config.key in name for name in prune_and_check(other))


def test_leases_of_trials_are_found(experiment):
    dataset = prepare(experiment)
    trial = override(experiment, {"storage": join(experiment.storage, "study"), "name": "trial-0001"})
    with run_lock.run_lock(trial.run_dir):
        record_dataset(trial, dataset)
        other = override(experiment, {"clip.height": 16})
        plan = prune.plan(other)
    set_name = f"store {dataset.decode_config.key}, set {dataset.location[-16:]}"
    assert not plan.removals
    assert plan.kept_reasons == [f"{set_name}: used by the running job study/trial-0001"]


def test_store_that_a_job_decodes_into_stays(experiment, monkeypatch):
    other = override(experiment, {"clip.height": 16})
    plans = []

    def decode_and_plan(chunks, decode):
        for chunk in chunks:
            yield decode(chunk)
            plans.append(prune.plan(other))

    monkeypatch.setattr(loader, "decode_blocks", decode_and_plan)
    prepare(experiment)
    assert len(plans) == 3 and not any(plan.removals for plan in plans)
    assert prune.plan(other).removals


def test_built_in_videos_in_use_stay(experiment, monkeypatch):
    def render(root: str, videos: list) -> None:
        for video in videos:
            write_bytes(join(root, video.path), video.name.encode())
        write_text(join(root, "moments_categories.txt"), "erupting,0\n")

    monkeypatch.setattr(synthetic_dataset, "render_all", render)
    fields = {"data.root": None, "data.synthetic.training_clips": 2, "data.synthetic.validation_clips": 1}
    used = override(experiment, fields)
    other = override(used, {"data.synthetic.seed": 1, "name": "other"})
    dataset, other_dataset = prepare(used), prepare(other)
    with run_lock.run_lock(other.run_dir):
        record_dataset(other, other_dataset)
        assert not prune_and_check(used)
    removed = prune_and_check(used)
    assert {name.split("/")[2] for name in removed if name.startswith("/data/")} == {Path(other_dataset.root).name}
    assert has_expected_clips(dataset)
    os.unlink(f"{dataset.root}/moments_categories.txt")
    assert Path(dataset.root).name not in str(prune_and_check(experiment))  # a job may be rendering it
    for path in Path(dataset.root).rglob("*"):
        make_old(path)
    assert any(Path(dataset.root).name in name for name in prune_and_check(experiment))


def test_bucket_is_pruned_like_a_folder(experiment, bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.01)
    remote = override(experiment, {"storage": f"{bucket}/prune"})
    dataset = prepare(remote)
    write_text(f"{remote.storage}/stores/other/recipe.json", '{"version": 2}')
    write_bytes(shards.get_shard_path(join(remote.storage, "stores", dataset.decode_config.key), "0"), b"xyz")
    for removal in prune.plan(remote).removals:
        removal.remove()
    left = list_files(remote.storage)
    assert not any(name.endswith("/0.u8") for name in left) and "/stores/other/recipe.json" not in left
    assert ClipDataset(dataset.location).ids == dataset.ids
