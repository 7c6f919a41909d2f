"""Clips of many pairs: the same as one by one, each failure listed, and nothing made twice."""

import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from giffy_ray.cluster.resources import Pool
from giffy_ray.core.errors import InputError
from giffy_ray.core.storage import filesystem_of, read_bytes, write_bytes
from giffy_ray.inference import bulk
from giffy_ray.inference.bulk import BulkResult, ClipOptions, interpolate_pairs
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.pairs import find_pairs
from tests.conftest import ROOT
from tests.inference.test_pairs import ODD_NAMES
from tests.inference.tiny_models import TINY_BETWEEN, TINY_CVAE, write_checkpoint

HEIGHT, WIDTH = 32, 48
OPTIONS = ClipOptions(frames=4, motion_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "between", TINY_BETWEEN)


@pytest.fixture(scope="module")
def cvae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "cvae", TINY_CVAE)


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Encodes random blocks of 8 pixels as PNG."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(file, "PNG")
    return file.getvalue()


def make_pairs(folder: Path, *names: str) -> str:
    for seed, name in enumerate(names):
        for side, offset in (("1.png", 0), ("2.png", 1)):
            path = folder / name / side
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(2 * seed + offset))
    return str(folder)


def decode(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_manifest(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(read_bytes(path).decode(), newline="")))


def run(pairs: str, output: Path | str, model: str, options: ClipOptions = OPTIONS, **arguments) -> BulkResult:
    return interpolate_pairs(pairs, str(output), model, options, **{"workers": 0, **arguments})


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_are_those_of_the_interpolator(tmp_path, model, local_ray, workers: int):
    pairs = make_pairs(tmp_path / "pairs", *ODD_NAMES)
    result = run(pairs, tmp_path / "out", model, workers=workers)
    assert (result.made, result.kept, result.count("ok")) == (len(ODD_NAMES), 0, len(ODD_NAMES))
    interpolator = Interpolator.from_pretrained(model, "cpu")
    for row, pair in zip(result.rows, find_pairs(pairs).pairs, strict=True):
        interpolator(pair.start, pair.end, 4, motion_size=32).save(tmp_path / "alone.mp4")
        expected, made = (decode(path.read_bytes()) for path in (tmp_path / "alone.mp4", tmp_path / "out" / row.output))
        # Threads add up convolutions in another order, which may round one level up or down.
        assert np.abs(made.astype(int) - expected).max() <= (2 if workers else 0)
        assert np.abs(made[1].astype(int) - made[0]).max() > 8
    assert [row.output for row in result.rows] == [f"{pair.name}.mp4" for pair in find_pairs(pairs).pairs]


def test_the_manifest_lists_all_clips(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", *ODD_NAMES)
    result = run(pairs, tmp_path / "out", model)
    assert result.manifest == f"{tmp_path}/out/manifest.csv"
    rows = read_manifest(result.manifest)
    assert list(rows[0]) == [
        "name",
        "start",
        "end",
        "output",
        "status",
        "error",
        "seconds",
        "width",
        "height",
        "frames",
    ]
    assert rows == [{name: str(value) for name, value in dataclasses.asdict(row).items()} for row in result.rows]
    assert sorted(row["name"] for row in rows) == sorted(ODD_NAMES)
    for row in rows:
        assert (row["status"], row["width"], row["height"], row["frames"]) == ("ok", str(WIDTH), str(HEIGHT), "4")
        assert 0 < float(row["seconds"]) < 60
        assert Path(row["start"]).read_bytes()
        assert len(decode((tmp_path / "out" / row["output"]).read_bytes())) == 4


def test_a_parquet_manifest_has_the_same_rows(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a", "b")
    (tmp_path / "pairs" / "b" / "1.png").write_bytes(b"")
    result = run(pairs, tmp_path / "out", model, manifest_format="parquet")
    table = pq.read_table(f"{tmp_path}/out/manifest.parquet")
    assert table.to_pylist() == [dataclasses.asdict(row) for row in result.rows]
    assert str(table.schema.field("frames").type) == "int64"


def test_every_kind_of_bad_pair_is_listed_and_the_others_are_made(tmp_path, model, monkeypatch):
    good, folder = picture(0), tmp_path / "images"
    folder.mkdir()
    animation = [Image.fromarray(np.full((16, 16, 3), level, np.uint8)) for level in (0, 200)]
    animation[0].save(folder / "animation.gif", save_all=True, append_images=animation[1:])
    for name, content in {
        "good.png": good,
        "cut.png": good[: len(good) // 2],
        "text.png": b"no image",
        "empty.png": b"",
        "one.ppm": b"P6 1 1 255\n\0\0\0",
        "huge.ppm": b"P6 20000 20000 255\n",
        "big.png": bytes(3000),
    }.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    monkeypatch.setattr(bulk, "_MAX_IMAGE_BYTES", 2500)
    assert len(good) < 2500
    expected = {
        "good.png": "",
        "cut.png": "cut.png: is damaged and cannot be decoded",
        "text.png": "text.png: is not an image that can be read",
        "empty.png": "empty.png: is not an image that can be read",
        "one.ppm": "one.ppm: has 1x1 pixels; at least 2x2 are needed",
        "huge.ppm": "huge.ppm: has more than 100 million pixels; scale it down",
        "animation.gif": "animation.gif: is an animation or has several pages; give a still image",
        "big.png": "end: .*big.png has 0.0 GiB; the limit is 1 GiB",
        "pipe.png": "end: .*pipe.png is not a regular file",
        "folder.png": "end: .*folder.png is not a regular file",
        "missing.png": "end: there is no file .*missing.png",
        "https://user:password@host/x.png": r"https:// is not supported",
        "x" * 300 + ".png": "File name too long",
    }
    rows = [f"good.png,{end},{number}" for number, end in enumerate(expected)]
    (folder / "t.csv").write_text(
        "\n".join(["start,end,name", *rows, ",good.png,13", f"good.png,good.png,{'y' * 300}"])
    )
    result = run(f"{folder}/t.csv", tmp_path / "out", model)
    assert [row.status for row in result.rows] == ["ok", *["failed"] * (len(expected) + 1)]
    for row, message in zip(
        result.rows, [*expected.values(), "File name too long", "row 15 has no start"], strict=True
    ):
        assert bool(row.error) == bool(message), row
        assert re.search(message, row.error)
        assert "\n" not in row.error
    text = read_bytes(result.manifest).decode()
    assert "password" not in text
    assert "https://***@host/x.png" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".records", "0.mp4", "manifest.csv"]


def test_files_of_a_folder_that_are_in_no_pair_are_no_failures(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a")
    (tmp_path / "pairs" / "notes.txt").touch()
    result = run(pairs, tmp_path / "out", model)
    assert [(row.status, row.error) for row in result.rows] == [
        ("ok", ""),
        ("skipped", f"{pairs}/notes.txt is not an image, by its suffix"),
    ]


def test_a_second_start_makes_only_what_has_changed(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", *"abcdef")
    output = tmp_path / "out"
    first = run(pairs, output, model)
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}
    again = run(pairs, output, model)
    assert (again.made, again.kept) == (0, 6)
    assert again.rows == first.rows
    assert times == {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}

    (tmp_path / "pairs" / "a" / "2.png").write_bytes(picture(77))
    os.utime(tmp_path / "pairs" / "b" / "1.png", ns=(0, 0))
    (output / "c.mp4").unlink()
    os.truncate(output / "d.mp4", 100)
    (output / ".records" / "e.json").write_text('{"version": 1, "key"')
    changed = run(pairs, output, model)
    assert (changed.made, changed.kept, changed.count("ok")) == (5, 1, 6)
    assert not np.array_equal(decode((output / "a.mp4").read_bytes())[-1], decode((output / "b.mp4").read_bytes())[-1])
    assert (run(pairs, output, model).kept) == 6


@pytest.mark.parametrize(
    "changes",
    [{"frames": 5}, {"fps": 12.0}, {"quality": 50}, {"seed": 1}, {"motion_size": 16}, {"fit": "pad"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_options_make_all_clips_again(tmp_path, model, changes):
    pairs = make_pairs(tmp_path / "pairs", "a", "b")
    run(pairs, tmp_path / "out", model)
    assert run(pairs, tmp_path / "out", model, dataclasses.replace(OPTIONS, **changes)).made == 2


def test_another_model_makes_all_clips_again(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a")
    run(pairs, tmp_path / "out", model)
    other = write_checkpoint(tmp_path / "other", TINY_BETWEEN, seed=1)
    copy = write_checkpoint(tmp_path / "copy", TINY_BETWEEN)
    assert run(pairs, tmp_path / "out", copy).kept == 1
    assert run(pairs, tmp_path / "out", other).made == 1


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path, model, monkeypatch):
    pairs = make_pairs(tmp_path / "pairs", *"abcd")
    output = tmp_path / "out"
    make_clips = bulk.ClipMaker._make_clips

    def interrupt(maker: bulk.ClipMaker, pair):
        if pair.name == "c":
            (output / ".c.mp4.123.partial").write_bytes(b"half of a clip")  # what a killed process leaves
            raise KeyboardInterrupt
        return make_clips(maker, pair)

    monkeypatch.setattr(bulk.ClipMaker, "_make_clips", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pairs, output, model)
    assert [row["name"] for row in read_manifest(f"{output}/manifest.csv")] == ["a", "b"]
    assert not (output / "c.mp4").exists()
    monkeypatch.undo()
    result = run(pairs, output, model)
    assert (result.made, result.kept) == (2, 2)
    assert sorted(path.name for path in output.glob(".*")) == [".records"]


def test_a_pair_that_kills_its_workers_fails_and_the_others_are_made(tmp_path, model, local_ray, monkeypatch):
    class DyingMaker(bulk.ClipMaker):
        def _make_clips(self, pair):
            if pair.name == "b":
                os._exit(1)
            return super()._make_clips(pair)

    class DyingFactory(bulk._MakerFactory):
        def __call__(self):
            maker = super().__call__()
            maker.__class__ = DyingMaker
            return maker

    monkeypatch.setattr(bulk, "_MakerFactory", DyingFactory)
    result = run(make_pairs(tmp_path / "pairs", *"abc"), tmp_path / "out", model, workers=1)
    assert [(row.name, row.status) for row in result.rows] == [("a", "ok"), ("b", "failed"), ("c", "ok")]
    assert result.rows[1].error == "2 workers died while they made this clip; see Ray's logs"


def test_a_pair_gets_new_attempts_when_the_job_is_started_again(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a")
    record = tmp_path / "out" / ".records" / "a.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"version": 1, "job": "an earlier start", "attempts": 2}))
    assert run(pairs, tmp_path / "out", model).made == 1


def test_a_model_that_is_replaced_while_the_job_starts_is_noticed(tmp_path, model, monkeypatch):
    pairs = make_pairs(tmp_path / "pairs", "a")
    digests = iter(["of the driver", "of the worker"])
    monkeypatch.setattr(bulk, "_digest_model", lambda interpolator: next(digests))
    with pytest.raises(InputError, match="was replaced while the job started; start it again"):
        run(pairs, tmp_path / "out", model)


def test_samples_are_clips_of_their_own(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a")
    result = run(pairs, tmp_path / "out", model, dataclasses.replace(OPTIONS, samples=3, seed=5))
    assert [row.output for row in result.rows] == ["a-1.mp4", "a-2.mp4", "a-3.mp4"]
    clips = Interpolator.from_pretrained(model, "cpu")(
        f"{pairs}/a/1.png", f"{pairs}/a/2.png", 4, samples=3, seed=5, motion_size=32
    )
    for row, clip in zip(result.rows, clips, strict=True):
        clip.save(tmp_path / "alone.mp4")
        assert (tmp_path / "out" / row.output).read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert result.made == 1


@pytest.mark.parametrize("file_format", ["gif", "webp"])
def test_other_formats(tmp_path, model, file_format: str):
    pairs = make_pairs(tmp_path / "pairs", "a")
    options = dataclasses.replace(OPTIONS, file_format=file_format)
    (row,) = run(pairs, tmp_path / "out", model, options).rows
    assert row.output == f"a.{file_format}"
    with Image.open(tmp_path / "out" / row.output) as image:
        assert (image.format, image.size, image.n_frames) == (file_format.upper(), (WIDTH, HEIGHT), 4)


def test_a_bucket_gives_the_clips_of_a_folder(tmp_path, model, bucket: str):
    local = make_pairs(tmp_path / "pairs", *ODD_NAMES)
    source, output = f"{bucket}/bulk/pairs", f"{bucket}/bulk/out"
    for path in Path(local).glob("*/*.png"):
        write_bytes(f"{source}/{path.parent.name}/{path.name}", path.read_bytes())
    expected = run(local, tmp_path / "out", model)
    result = run(source, output, model)
    assert [row.output for row in result.rows] == [row.output for row in expected.rows]
    for row in result.rows:
        assert read_bytes(f"{output}/{row.output}") == (tmp_path / "out" / row.output).read_bytes()
    assert len(read_manifest(result.manifest)) == len(ODD_NAMES)
    assert run(source, output, model).kept == len(ODD_NAMES)
    filesystem, key = filesystem_of(f"{output}/{result.rows[0].output}")
    filesystem.delete_file(key)
    write_bytes(f"{source}/{ODD_NAMES[1]}/1.png", b"no image")
    third = run(source, output, model)
    assert (third.made, third.count("failed")) == (1, 1)


def test_a_table_in_a_bucket_runs_on_the_cluster(tmp_path, model, bucket: str, local_ray):
    folder = f"{bucket}/bulk-table"
    write_bytes(f"{folder}/x/1.png", picture(0))
    (tmp_path / "2.png").write_bytes(picture(1))
    write_bytes(f"{folder}/t.csv", f"start,end,name\nx/1.png,{tmp_path}/2.png,sub/é\nx/1.png,y.png,bad\n".encode())
    result = run(f"{folder}/t.csv", tmp_path / "out", model, workers=1)
    assert [(row.output, row.status) for row in result.rows] == [("sub/é.mp4", "ok"), ("", "failed")]
    assert result.rows[1].error == f"end: there is no file {folder}/y.png"
    assert len(decode((tmp_path / "out" / "sub" / "é.mp4").read_bytes())) == 4


def test_a_model_of_fixed_size(tmp_path, cvae):
    pairs = make_pairs(tmp_path / "pairs", "a")
    with pytest.raises(InputError, match="generates only 6 evenly spaced frames"):
        run(pairs, tmp_path / "out", cvae, ClipOptions(frames=4, resize=True))
    (row,) = run(pairs, tmp_path / "out", cvae, ClipOptions(frames=6)).rows
    assert "generates only 16x16 pixels, and the pictures have 48x32; scale them" in row.error
    (row,) = run(pairs, tmp_path / "out", cvae, ClipOptions(frames=6, resize=True)).rows
    assert (row.status, row.width, row.height, row.frames) == ("ok", 16, 16, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 1}, r"frames: must be at least 2 \(value 1\)"),
        ({"samples": 0}, r"samples: must be at least 1 \(value 0\)"),
        ({"seed": -1}, r"seed: must be at least 0 \(value -1\)"),
        ({"motion_size": 4}, r"motion_size: must be at least 8 \(value 4\)"),
        ({"file_format": "avi"}, r"file_format: must be one of mp4, gif, webp \(value 'avi'\)"),
        ({"fit": "fill"}, r"fit: must be one of crop, pad, stretch \(value 'fill'\)"),
        ({"fps": float("nan")}, "fps: must be 0.01 to 1000 for mp4"),
        ({"quality": 101}, r"quality: must be 0 to 100 \(value 101\)"),
    ],
)
def test_an_option_that_can_never_work_is_refused_at_once(tmp_path, model, options, message: str):
    pairs = make_pairs(tmp_path / "pairs", "a")
    with pytest.raises(InputError, match=message):
        run(pairs, tmp_path / "out", model, ClipOptions(**options))
    assert not list((tmp_path / "out").glob("*"))


def test_an_output_that_cannot_be_used_is_refused(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a")
    for inside in ("", "/", "/clips", "/a/b"):
        with pytest.raises(InputError, match="lies in the folder of the pairs, where another start"):
            run(pairs, f"{pairs}{inside}", model)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output: cannot be written: not a folder \(value '.*/file'\)"):
        run(pairs, tmp_path / "file", model)
    with pytest.raises(InputError, match="output: cannot be written: ftp:// is not supported"):
        run(pairs, "ftp://host/x", model)
    assert run(pairs, f"{pairs}-clips", model).made == 1


def test_a_model_or_cluster_that_cannot_be_used_is_refused(tmp_path, model, local_ray):
    pairs = make_pairs(tmp_path / "pairs", "a")
    for arguments, message in (
        ({"workers": -1}, r"workers: must be at least 0 \(value -1\)"),
        ({"gpus_per_worker": -1.0, "workers": 1}, r"gpus_per_worker: must be at least 0 \(value -1\)"),
        ({"gpus_per_worker": 0.5}, "gpus_per_worker: has no effect without workers"),
        ({"workers": 3}, "workers: the cluster has room for 2 of 3 workers with 1 CPU and 0 GPUs each"),
        ({"workers": None, "gpus_per_worker": 0.5}, "the cluster has room for 0 of 1 workers with 1 CPU and 0.5 GPUs"),
    ):
        with pytest.raises(InputError, match=message):
            run(pairs, tmp_path / "out", model, **arguments)
    with pytest.raises(InputError, match="model: there is none at 'no-such-model'"):
        run(pairs, tmp_path / "out", "no-such-model")


def test_workers_follow_from_the_cluster(model, local_ray):
    interpolator = Interpolator.from_pretrained(model, "cpu")
    assert bulk._plan_pool(interpolator, 100, 2, None) == Pool(2, {"num_cpus": 1, "num_gpus": 0.0})
    assert bulk._plan_pool(interpolator, 1, 2, None).actors == 1
    assert bulk._plan_pool(interpolator, 100, None, 0.0).actors == 2
    assert bulk._plan_pool(interpolator, 100, None, None).actors in (1, 2)
    assert bulk._plan_pool(interpolator, 4, None, None).actors == 0  # not worth the start of actors


def run_job(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "jobs" / "interpolate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_job_reports_failures_by_exit_code(tmp_path, model):
    pairs = make_pairs(tmp_path / "pairs", "a", "b")
    (tmp_path / "pairs" / "b" / "2.png").write_bytes(b"no image")
    arguments = (pairs, "-o", f"{tmp_path}/out", "--model", model, "--frames", "3", "--workers", "0")
    first = run_job(*arguments)
    assert first.returncode == 1
    assert first.stderr.startswith(f"failed: b: {pairs}/b/2.png: is not an image that can be read")
    assert len(first.stderr.splitlines()) == 1
    assert first.stdout.splitlines()[-1] == (
        f"pairs: 1 made, 0 complete before, 1 failed; 0 files in no pair; listed in {tmp_path}/out/manifest.csv"
    )
    (tmp_path / "pairs" / "b" / "2.png").write_bytes(picture(3))
    second = run_job(*arguments)
    assert (second.returncode, second.stderr) == (0, "")
    assert "1 made, 1 complete before, 0 failed" in second.stdout


def test_the_job_refuses_wrong_arguments_in_one_line(tmp_path):
    missing = run_job(str(tmp_path / "missing"), "-o", f"{tmp_path}/out")
    assert missing.returncode == 2
    assert missing.stderr == (
        f"interpolate.py: {tmp_path}/missing: cannot be read as a folder or table of pairs: No such file or directory\n"
    )
    wrong = run_job(str(tmp_path), "-o", f"{tmp_path}/out", "--flow-size", "large")
    assert wrong.returncode == 2
    assert "'large' is neither auto nor a number of pixels" in wrong.stderr
