"""What nobody needs is removed from the storage, and nothing else: videos are told apart by bytes, not decoded."""

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
from giffy_ray.data.decode import RejectedVideo, Sampled, Source
from giffy_ray.data.prepare import prepare
from giffy_ray.data.synthetic import dataset

VIDEOS, BROKEN = 6, b"no video"


class FakeSandbox:
    def __init__(self, clip, limits, decoder):
        self.clip = clip

    def sample(self, video: bytes) -> Sampled:
        if video == BROKEN:
            raise RejectedVideo("not_video", "it says so")
        shape = (self.clip.frames, self.clip.height, self.clip.width, 3)
        frames = np.random.default_rng(list(video)).integers(256, size=shape, dtype=np.uint8)
        return Sampled(frames, np.arange(len(frames)) / self.clip.fps, 0, Source("h264", 8, 8, 30.0, 1.0, False))


@pytest.fixture(autouse=True)
def without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: map(decode, chunks))
    monkeypatch.setattr(shards, "sandbox_for", FakeSandbox)
    monkeypatch.setattr(shards, "SHARD_VIDEOS", 2)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    for number in range(VIDEOS):
        write_bytes(f"{tmp_path}/videos/training/a/{number}.mp4", b"video %d" % number)
    fields = {"clip.frames": 4, "clip.height": 8, "clip.width": 8}
    return override(
        Experiment(), fields | {"data.root": str(tmp_path / "videos"), "storage": str(tmp_path / "runs"), "name": "run"}
    )


def files_of(storage: str) -> dict[str, int]:
    """Path below the storage -> bytes."""
    filesystem, base = filesystem_of(storage)
    infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    return {info.path.removeprefix(base): info.size for info in infos if info.type == fs.FileType.File}


def removed(experiment: Experiment) -> dict[str, int]:
    """Removes what is not needed; returns it, and checks that it is what was said, and that looking removes nothing."""
    before, found = files_of(experiment.storage), prune.plan(experiment)
    assert files_of(experiment.storage) == before
    for removal in found.removals:
        removal.remove()
    after = files_of(experiment.storage)
    gone = {name: size for name, size in before.items() if name not in after}
    assert sum(removal.files for removal in found.removals) == len(gone)
    assert sum(removal.bytes for removal in found.removals) == sum(gone.values())
    assert not prune.plan(experiment).removals
    return gone


def name_clips(run: Experiment, store: ClipDataset) -> None:
    """As a training does once it holds the run's lease."""
    write_text(join(run.storage, run.name, "data_set"), store.fingerprint)
    write_text(join(run.storage, run.name, prune.DATA_SET_LOCATION), store.location)


def reasons(experiment: Experiment) -> dict[str, str]:
    return {removal.what: removal.why for removal in prune.plan(experiment).removals}


def is_whole(store: ClipDataset) -> bool:
    for row, name in enumerate(store.ids):
        content = (Path(store.root) / name).read_bytes()
        if not np.array_equal(
            store.get_clips(np.asarray([row]))[0], FakeSandbox(store.clip, None, "").sample(content).clip
        ):
            return False
    return True


def make_old(path: Path) -> None:
    old_s = time.time() - 2 * shards.STALE_S
    os.utime(path, (old_s, old_s))


def test_what_is_needed_stays(experiment):
    store = prepare(experiment)
    assert not removed(experiment) and is_whole(ClipDataset(store.location))
    assert not list(Path(experiment.storage).glob("stores/*/jobs/*"))


def test_stores_of_other_settings_and_versions_are_removed(experiment, monkeypatch):
    others = [
        prepare(override(experiment, {"clip.height": 16})),
        prepare(override(experiment, {"data.cache_decoded": False})),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "VERSION", 2)
        old = prepare(experiment)
    store = prepare(experiment)
    keys = [other.location.split("/")[-3] for other in (*others, old)]
    assert reasons(experiment) == {
        f"store {keys[0]}": "other decode settings: height=16",
        f"store {keys[1]}": "other decode settings: cache=False",
        f"store {keys[2]}": "version 2 of decoding; it is 3 now",
    }
    assert {name.split("/")[2] for name in removed(experiment)} == set(keys)
    assert [path.name for path in Path(experiment.storage, "stores").iterdir()] == [store.recipe.key]
    assert is_whole(ClipDataset(store.location))


def test_shards_of_deleted_and_changed_videos_are_removed(experiment, monkeypatch):
    old = prepare(experiment)
    videos = Path(experiment.data.root, "training", "a")
    for name in ("0.mp4", "1.mp4", "2.mp4"):  # a whole shard, and half of one
        (videos / name).unlink()
    (videos / "4.mp4").write_bytes(b"another video")
    store = prepare(experiment)
    gone = removed(experiment)
    assert [Path(name).suffix for name in sorted(gone) if "/shards/" in name].count(".u8") == 1
    assert any(old.location.rpartition("/")[2] in name for name in gone)
    assert is_whole(ClipDataset(store.location))
    with pytest.raises(FileNotFoundError):
        ClipDataset(old.location)
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: pytest.fail("decoded again"))
    assert prepare(experiment, again=True).location == store.location


def test_shards_of_videos_that_are_not_prepared_yet_stay(experiment, monkeypatch):
    prepare(experiment)
    videos = Path(experiment.data.root, "training", "a")
    (videos / "5.mp4").unlink()
    removed(experiment)
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: pytest.fail("decoded again"))
    assert len(prepare(experiment)) == VIDEOS - 1


def test_a_reject_stays_known_where_the_shard_beside_it_is_removed(experiment, monkeypatch):
    videos = Path(experiment.data.root, "training", "a")
    for name, content in (("6.mp4", b"video 6"), ("7.mp4", BROKEN)):
        (videos / name).write_bytes(content)
    location = Path(prepare(experiment).location).parents[1]
    (videos / "6.mp4").unlink()
    *_, found = prune.plan(experiment).removals  # the set and its pointer come first
    assert (found.files, found.bytes) == (1, 4 * 8 * 8 * 3)
    found.remove()
    assert len(list(location.glob("shards/*.u8"))) == VIDEOS // 2
    assert shards.read_index(str(location))["reason"].to_pylist().count("not_video") == 1
    monkeypatch.setattr(loader, "decode_all", lambda chunks, decode: pytest.fail("decoded again"))
    assert len(prepare(experiment).rejects) == 1


def test_what_killed_jobs_left_is_removed(experiment):
    store = prepare(experiment)
    location = Path(store.location).parents[1]
    orphan, partial, young = (location / "shards" / name for name in ("0.u8", "a.u8.1.partial", "b.u8.2.partial"))
    left = [orphan, partial, Path(experiment.storage, ".3.partial"), location / "catalogs" / "0123456789abcdef.lock"]
    for path in (*left, young):
        path.write_bytes(b"xyz")
    for path in left[1:]:
        make_old(path)
    job = override(experiment, {"storage": str(location / "jobs"), "name": "killed"})
    write_text(run_lock.location_of(job.run_dir), '{"renewed_s": 0}')
    left.append(Path(run_lock.location_of(job.run_dir)))
    assert set(removed(experiment)) == {str(path).removeprefix(experiment.storage) for path in left}
    assert young.exists() and is_whole(store)


def test_what_a_running_training_uses_stays(experiment):
    """Its videos were changed since, and another experiment with other settings is what prunes."""
    store = prepare(experiment)
    with run_lock.run_lock(experiment.run_dir):
        name_clips(experiment, store)
        other = override(experiment, {"clip.height": 16})
        prepare(other)
        shutil.rmtree(experiment.data.root)
        write_bytes(f"{experiment.data.root}/training/a/9.mp4", b"the only video now")
        assert {name.split("/")[2] for name in removed(other)} == {prune.DecodeConfig(other.clip).key}
        assert np.array_equal(
            ClipDataset(store.location).get_clips(np.arange(VIDEOS)), store.get_clips(np.arange(VIDEOS))
        )
        # A run that was started before it left the location, and one that has not said anything yet.
        os.unlink(f"{experiment.storage}/run/{prune.DATA_SET_LOCATION}")
        assert not removed(other)
        os.unlink(f"{experiment.storage}/run/data_set")
        found = prune.plan(experiment)
        assert not found.removals and found.kept == [
            "everything: run is running, and does not say yet which clips it uses"
        ]
        _claim_again = store.location
        write_text(f"{experiment.storage}/run/{prune.DATA_SET_LOCATION}", _claim_again)
    assert any(store.recipe.key in name for name in removed(other))


def test_trials_hold_leases_below_their_search(experiment):
    store = prepare(experiment)
    trial = override(experiment, {"storage": join(experiment.storage, "study"), "name": "trial-0001"})
    with run_lock.run_lock(trial.run_dir):
        name_clips(trial, store)
        other = override(experiment, {"clip.height": 16})
        found = prune.plan(other)
    assert not found.removals
    assert found.kept == [f"store {store.recipe.key}, set {store.location[-16:]}: study/trial-0001 is running"]


def test_nothing_is_removed_from_a_store_that_a_job_decodes_into(experiment, monkeypatch):
    other = override(experiment, {"clip.height": 16})
    planned = []

    def while_decoding(chunks, decode):
        for chunk in chunks:
            yield decode(chunk)
            planned.append(prune.plan(other))

    monkeypatch.setattr(loader, "decode_all", while_decoding)
    prepare(experiment)
    assert len(planned) == 3 and not any(found.removals for found in planned)
    assert prune.plan(other).removals


def test_built_in_videos_in_use_stay(experiment, monkeypatch):
    def render(root: str, videos: list) -> None:
        for video in videos:
            write_bytes(join(root, video.path), video.name.encode())
        write_text(join(root, "moments_categories.txt"), "erupting,0\n")

    monkeypatch.setattr(dataset, "render_all", render)
    fields = {"data.root": None, "data.synthetic.training_clips": 2, "data.synthetic.validation_clips": 1}
    used = override(experiment, fields)
    other = override(used, {"data.synthetic.seed": 1, "name": "other"})
    store, theirs = prepare(used), prepare(other)
    with run_lock.run_lock(other.run_dir):
        name_clips(other, theirs)
        assert not removed(used)
    gone = removed(used)
    assert {name.split("/")[2] for name in gone if name.startswith("/data/")} == {Path(theirs.root).name}
    assert is_whole(store)
    os.unlink(f"{store.root}/moments_categories.txt")
    assert Path(store.root).name not in str(removed(experiment))  # it may be being rendered
    for path in Path(store.root).rglob("*"):
        make_old(path)
    assert any(Path(store.root).name in name for name in removed(experiment))


def test_a_bucket_is_pruned_as_a_folder_is(experiment, bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "_SETTLE_S", 0.01)
    remote = override(experiment, {"storage": f"{bucket}/prune"})
    store = prepare(remote)
    write_text(f"{remote.storage}/stores/other/recipe.json", '{"version": 2}')
    write_bytes(shards.shard_path(join(remote.storage, "stores", store.recipe.key), "0"), b"xyz")
    for removal in prune.plan(remote).removals:
        removal.remove()
    left = files_of(remote.storage)
    assert not any(name.endswith("/0.u8") for name in left) and "/stores/other/recipe.json" not in left
    assert ClipDataset(store.location).ids == store.ids
