"""`giffy interpolate` with real files: the clips, the options, and every mistake."""

import gc
import inspect
import itertools
import json
import os
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from giffy_ray.cli import key_frames
from giffy_ray.cli.interpolate import interpolate
from giffy_ray.core.errors import InputError
from giffy_ray.inference.clip import DEFAULT_QUALITY
from giffy_ray.inference.interpolator import DEFAULT_MODEL, Interpolator, frame_times
from tests.cli.conftest import Result, make_picture
from tests.conftest import moving_video

Run = Callable[..., Result]


def read_frames(folder: str | Path, pattern: str = "frame_*.png") -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob(pattern))])


def decode(path: str) -> tuple[np.ndarray, float]:
    """Returns the frames of a clip, uint8 [time, height, width, channels], and its frames per second."""
    if path.endswith(".mp4"):
        with av.open(path) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack(frames), float(container.streams.video[0].average_rate or 0)
    image = Image.open(path)
    frames = []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames), 1000 / image.info["duration"]


def loaded(name: str) -> np.ndarray:
    return np.asarray(Image.open(name))


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_two_pictures_become_a_clip(run_giffy: Run, model: str, pictures: list[str], suffix: str):
    result = run_giffy(
        "interpolate", *pictures[:2], "-o", f"out.{suffix}", "--model", model, "--frames", 5, "--fps", 20
    )
    assert result == (0, f"out.{suffix}: 5 frames of 32x24 at 20 fps\n", "")
    frames, fps = decode(f"out.{suffix}")
    assert frames.shape == (5, 24, 32, 3)
    assert fps == 20
    for frame, name in ((frames[0], pictures[0]), (frames[-1], pictures[1])):
        assert (
            np.abs(frame.astype(int) - loaded(name)).mean() < 40 < np.abs(255 - frame.astype(int) - loaded(name)).mean()
        )


def test_the_clip_equals_that_of_the_interpolator(run_giffy: Run, model: str, pictures: list[str]):
    result = run_giffy("interpolate", *pictures[:2], "-o", "out", "--model", model, "--frames", 4)
    assert result.exit_code == 0
    expected = Interpolator.from_pretrained(model)(*pictures[:2], frames=4)
    assert np.array_equal(read_frames("out"), expected.frames)
    assert not np.array_equal(expected.frames[1], expected.frames[2])


def test_the_defaults_are_those_of_the_interpolator():
    call = inspect.signature(Interpolator.__call__).parameters
    defaults = {option.name: option.default for option in interpolate.params}
    for name in ("frames", "samples", "seed", "fps", "fit"):
        assert defaults[name] == call[name].default
    assert (defaults["model"], defaults["quality"]) == (DEFAULT_MODEL, DEFAULT_QUALITY)


def test_key_frames_are_shown_once(run_giffy: Run, model: str, pictures: list[str]):
    result = run_giffy("interpolate", *pictures, "-o", "out", "--model", model, "--frames", 5)
    frames = read_frames("out")
    assert len(frames) == 3 * 4 + 1
    assert f": {len(frames)} frames" in result.stdout
    for number, name in enumerate(pictures):
        assert [index for index, frame in enumerate(frames) if np.array_equal(frame, loaded(name))] == [4 * number]


@pytest.mark.parametrize("count", [2, 3])
def test_a_loop_returns_to_the_first_picture(run_giffy: Run, model: str, pictures: list[str], count: int):
    run_giffy("interpolate", *pictures[:count], "-o", "out", "--model", model, "--frames", 4, "--loop")
    frames = read_frames("out")
    assert len(frames) == count * 3
    interpolator = Interpolator.from_pretrained(model)
    last = interpolator(pictures[count - 1], pictures[0], frames=4).frames
    assert np.array_equal(frames[-3:], last[:3])
    assert np.array_equal(frames[0], last[3])  # what follows when the clip repeats


def test_a_duration_divides_the_clip_evenly(run_giffy: Run, model: str, pictures: list[str]):
    arguments = ["--model", model, "--duration", 2.2, "--fps", 5, "--json"]
    result = json.loads(run_giffy("interpolate", *pictures[:3], "-o", "out", *arguments).stdout)
    frames = read_frames("out")
    assert len(frames) == result["frames"] == 11
    for index, name in zip((0, 5, 10), pictures, strict=False):
        assert np.array_equal(frames[index], loaded(name))


@pytest.mark.parametrize("ease", ["linear", "in", "out", "in-out"])
def test_easing_changes_the_times(run_giffy: Run, model: str, pictures: list[str], ease: Any):
    run_giffy("interpolate", *pictures[:2], "-o", "out", "--model", model, "--frames", 5, "--ease", ease)
    interpolator = Interpolator.from_pretrained(model)
    expected = interpolator.iter_frames(*map(loaded, pictures[:2]), frame_times(5, ease))
    assert np.array_equal(read_frames("out"), np.stack(list(expected)))


@pytest.mark.parametrize(("seed", "motion_size"), [(0, None), (3, 16)])
def test_samples_are_those_of_the_interpolator(
    run_giffy: Run, model: str, pictures: list[str], seed: int, motion_size: int | None
):
    options = ["--samples", 3, "--seed", seed, "--flow-size", motion_size or "auto", "--frames", 3, "--model", model]
    result = run_giffy("interpolate", *pictures[:2], "-o", "out", *options)
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["out-1", "out-2", "out-3"]
    interpolator = Interpolator.from_pretrained(model)
    expected = interpolator(*pictures[:2], frames=3, samples=3, seed=seed, motion_size=motion_size)
    middles = {clip.frames[1].tobytes() for clip in expected}
    assert len(middles) == 3
    for number, clip in enumerate(expected, 1):
        assert np.array_equal(read_frames(f"out-{number}"), clip.frames)


def test_samples_of_files_are_numbered(run_giffy: Run, model: str, pictures: list[str]):
    options = ["--samples", 2, "--frames", 2, "--model", model]
    for name in ("out.gif", "frame_%02d.png", "walk.png"):
        assert run_giffy("interpolate", *pictures[:2], "-o", f"clips/{name}", *options).exit_code == 0
    assert sorted(os.listdir("clips")) == [
        *("frame_01-1.png", "frame_01-2.png", "frame_02-1.png", "frame_02-2.png"),
        *("out-1.gif", "out-2.gif"),
        *("walk-1_0001.png", "walk-1_0002.png", "walk-2_0001.png", "walk-2_0002.png"),
    ]


def test_json_describes_the_clip(run_giffy: Run, model: str, pictures: list[str]):
    options = ["--model", model, "--frames", 3, "--samples", 2, "--device", "cpu", "--flow-size", 32, "--json"]
    result = run_giffy("interpolate", *pictures[:3], "-o", "out.mp4", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    described = json.loads(result.stdout)
    assert 0 < described.pop("seconds") < 60
    assert described == {
        "output": "out.mp4",
        "files": ["out-1.mp4", "out-2.mp4"],
        "frames": 5,
        "fps": 10.0,
        "width": 32,
        "height": 24,
        "motion_sizes": [32, 32],
        "model": model,
        "device": "cpu",
        "dtype": "float32",
    }


def test_quiet_prints_nothing(run_giffy: Run, model: str, pictures: list[str]):
    arguments = [*pictures[:2], "-o", "out.mp4", "--model", model, "--frames", 3]
    assert run_giffy("interpolate", *arguments, "--quiet") == (0, "", "")


def test_a_terminal_shows_a_bar_on_stderr(
    run_giffy: Run, model: str, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = [*pictures[:2], "-o", "out.mp4", "--model", model, "--frames", 3, "--overwrite", "--json"]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    result = run_giffy("interpolate", *arguments)
    assert "3/3" in result.stderr
    assert json.loads(result.stdout)["frames"] == 3
    assert run_giffy("interpolate", *arguments, "--quiet").stderr == ""


def test_the_first_picture_decides_the_size(run_giffy: Run, model: str, pictures: list[str]):
    Image.fromarray(make_picture(9, 48, 40)).save("tall.jpg")
    for fit in ("crop", "pad", "stretch"):
        run_giffy("interpolate", pictures[0], "tall.jpg", "-o", fit, "--model", model, "--frames", 2, "--fit", fit)
    last = {fit: read_frames(fit)[1] for fit in ("crop", "pad", "stretch")}
    assert {frame.shape for frame in last.values()} == {(24, 32, 3)}
    assert not np.array_equal(last["crop"], last["stretch"])
    assert last["pad"][:, 0].max() == 0 < last["stretch"][:, 0].max()


def test_transparency_of_one_picture_is_kept_in_all_frames(run_giffy: Run, model: str, pictures: list[str]):
    transparent = make_picture(7, channels=4)
    Image.fromarray(transparent).save("transparent.png")
    names = [*pictures[:2], "transparent.png"]
    result = run_giffy("interpolate", *names, "-o", "out", "--model", model, "--frames", 3)
    assert result.exit_code == 0, result.stderr
    frames = read_frames("out")
    assert frames.shape == (5, 24, 32, 4)
    assert (frames[[0, 1, 2], :, :, 3] == 255).all()
    assert np.array_equal(frames[4], transparent)


def test_few_pictures_are_in_memory(pictures: list[str], monkeypatch: pytest.MonkeyPatch):
    """Counts the live arrays while a loop of twelve pictures is read."""
    live: list[weakref.ref] = []

    def read(path: str) -> np.ndarray:
        array = np.array(Image.open(path))
        live.append(weakref.ref(array))
        return array

    monkeypatch.setattr(key_frames, "read_image", read)
    twelve = [f"./{folder}{name}" for folder in ("", "./", "././") for name in pictures]
    most = 0
    for _ in itertools.pairwise(key_frames.KeyFrames(twelve, "crop", loop=True)):
        gc.collect()
        most = max(most, sum(reference() is not None for reference in live))
    assert len(live) >= 24
    assert most <= 4  # the first, two of the segment, and one in the cache


def test_frames_are_written_as_they_are_generated(
    run_giffy: Run, model: str, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    events = []

    def iter_frames(self: Any, start: np.ndarray, end: np.ndarray, times: list[float], **_: Any):
        for time in times:
            events.append("generated")
            yield start if time < 1 else end

    def save_frames(frames: Any, *_: Any) -> int:
        for _frame in frames:
            events.append("written")
        return len(events) // 2

    monkeypatch.setattr(Interpolator, "iter_frames", iter_frames)
    monkeypatch.setattr(key_frames, "save_frames", save_frames)
    run_giffy("interpolate", *pictures, "-o", "out.mp4", "--model", model, "--frames", 4)
    assert events == ["generated", "written"] * 10


def test_odd_sizes_and_jpeg(run_giffy: Run, model: str, pictures: list[str]):
    for number in range(2):
        Image.fromarray(make_picture(number)[:23, :31]).save(f"odd{number}.jpg")
    result = run_giffy("interpolate", "odd0.jpg", "odd1.jpg", "-o", "out.mp4", "--model", model, "--frames", 3)
    assert result.stdout == "out.mp4: 3 frames of 31x23 at 10 fps\n"
    assert decode("out.mp4")[0].shape == (3, 24, 32, 3)


def test_an_existing_output_is_replaced_only_on_request(run_giffy: Run, model: str, pictures: list[str]):
    arguments = [*pictures[:2], "--model", model, "--frames"]
    for output in ("out.gif", "out", "walk_%03d.png"):
        assert run_giffy("interpolate", *arguments, 4, "-o", output).exit_code == 0
        result = run_giffy("interpolate", *arguments, 3, "-o", output)
        assert result.exit_code == 2
        assert re.fullmatch(
            r"giffy: .+: exists already; choose another --output, or replace it with --overwrite\n", result.stderr
        )
        assert run_giffy("interpolate", *arguments, 3, "-o", output, "--overwrite").exit_code == 0
    assert len(decode("out.gif")[0]) == 3
    assert sorted(os.listdir("out")) == [f"frame_000{number}.png" for number in (1, 2, 3)]  # the fourth is gone
    assert len(list(Path().glob("walk_*.png"))) == 3
    assert len(list(Path().glob("?.png"))) == 4


MISTAKES = [
    ("", r"Missing argument 'INPUT...'\. See 'giffy interpolate --help'\."),
    ("0.png 1.png", r"Missing option '-o' / '--output'\."),
    ("0.png -o a.mp4", r"0\.png: is one picture; give two or more, a video, or a folder"),
    ("0.png none.png -o a.mp4", r"none\.png: no such file or folder"),
    ("none.mp4 -o a.mp4 --times 2", r"none\.mp4: no such file or folder"),
    ("0.png . -o a.mp4", r"\.: is a folder; give it alone, or pictures only"),
    ("0.png film.mp4 -o a.mp4", r"film\.mp4: is a video; give it alone, or pictures only"),
    ("0.png text.txt -o a.mp4", r"text\.txt: is not an image that can be read"),
    ("0.png cut.png -o a.mp4", r"cut\.png: is damaged and cannot be decoded"),
    ("0.png 1.png -o a.avi", r"a\.avi: the format \.avi is not supported; expected \.mp4"),
    ("0.png 1.png -o %d%d.png", r"%d%d\.png: .* one number"),
    ("0.png 1.png -o text.txt/a.mp4", r"text\.txt/a\.mp4: cannot be "),
    ("0.png 1.png -o 1.png/a", r"1\.png/a: cannot be "),
    ("0.png 1.png -o text.txt", r"text\.txt: the format \.txt is not supported"),
    ("0.png 1.png -o folder.gif", r"folder\.gif: exists already"),
    ("0.png 1.png -o folder.gif --overwrite", r"folder\.gif: is a folder"),
    ("film.mp4 -o text.txt/a.mp4 --times 2", r"text\.txt/a\.mp4: cannot be "),
    ("film.mp4 -o a.gif --times 2", r"a\.gif: a video .* \.mp4"),
    ("still.webp 1.png -o still.webp --overwrite", r"still\.webp: is an input too"),
    ("film.mp4 -o a.mp4 --times 2 --loop", "--loop is for pictures or a folder, and the input is a video"),
    ("film.mp4 -o a.mp4", r"film\.mp4: give one of --times and --to-fps for a video, such as --times 2"),
    ("film.mp4 -o a.mp4 --times 2 --to-fps 30", r"film\.mp4: give one of --times and --to-fps"),
    ("text.txt -o a.mp4", r"text\.txt: give one of .*; or give two or more pictures"),
    ("film.mp4 -o film.mp4 --times 2", r"film\.mp4: exists already"),
    ("film.mp4 -o a.mp4 --times 1", "Invalid value for '--times': 1.0 is not in the range x>1"),
    ("empty -o clips", ".*/empty: has no pairs of images"),
    ("pairs -o text.txt", r"text\.txt: is a file; the clips of a folder are written to a folder"),
    ("pairs -o pairs/clips", "pairs/clips: is in the folder of the pairs"),
    ("pairs -o clips --times 2", "--times is for a video, and the input is a folder"),
]
MISTAKEN_OPTIONS = [
    ("--times 2", "--times is for a video, and the input is pictures"),
    ("--to-fps 30", "--to-fps is for a video, and the input is pictures"),
    ("--format gif", "--format is for a folder, and the input is pictures"),
    ("--frames 1", "Invalid value for '--frames': 1 is not in the range x>=2"),
    ("--frames x", "Invalid value for '--frames': 'x' is not a valid integer"),
    ("--fps 0", "Invalid value for '--fps': 0.0 is not in the range"),
    ("--fps nan", "Invalid value for '--fps': nan is not a finite number"),
    ("--duration inf", "Invalid value for '--duration': inf is not a finite number"),
    ("--duration 0.1", "--duration: 0.1 s at 10 frames per second are 1 frames, fewer than the 2 pictures"),
    ("--duration 1 --frames 3", "--frames and --duration exclude each other"),
    ("--quality 101", "Invalid value for '--quality': 101 is not in the range"),
    ("--samples 0", "Invalid value for '--samples': 0 is not in the range"),
    ("--flow-size big", "Invalid value for '--flow-size': 'big' is neither auto nor a number of pixels"),
    ("--flow-size 4", "Invalid value for '--flow-size': '4' is neither auto nor a number of pixels, at least 8"),
    ("--ease fast", "Invalid value for '--ease': 'fast' is not one of 'linear', 'in', 'out', 'in-out'"),
    ("--device tpu", "device: 'tpu' is not available here; use .*cpu"),
    ("--dtype int8", "Invalid value for '--dtype': 'int8' is not one of"),
    ("--model nothing", "model: there is none at 'nothing'"),
    ("--model models:/a@b", "model: set MLFLOW_TRACKING_URI"),
    ("--colour red", "No such option '--colour'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [*MISTAKES, *((f"0.png 1.png -o a.mp4 {options}", message) for options, message in MISTAKEN_OPTIONS)],
)
def test_a_mistake_is_reported_in_one_line(
    run_giffy: Run, pictures: list[str], monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("text.txt").write_text("no picture")
    Path("film.mp4").write_bytes(moving_video(0, 4, 4))
    Path("cut.png").write_bytes(Path("1.png").read_bytes()[:60])
    Image.fromarray(make_picture(0)).save("still.webp")
    Path("empty").mkdir()
    Path("folder.gif").mkdir()
    Path("pairs/walk").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(make_picture(number)).save(f"pairs/walk/{number}.png")
    before = sorted(Path().rglob("*"))
    result = run_giffy("interpolate", *arguments.split())
    assert result.exit_code == 2, result
    assert re.search(f"^giffy: {message}", result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before


def test_a_model_of_fixed_size_says_so(run_giffy: Run, fixed_size_model: str, pictures: list[str]):
    arguments = [*pictures[:2], "-o", "out", "--model", fixed_size_model]
    result = run_giffy("interpolate", *arguments, "--frames", 6)
    assert result.exit_code == 2
    assert "generates only 16x16 pixels, and the pictures have 32x24" in result.stderr
    result = run_giffy("interpolate", *arguments, "--resize")
    assert result.exit_code == 2
    assert "generates only 6 evenly spaced frames" in result.stderr
    result = run_giffy("interpolate", *arguments, "--resize", "--frames", 6)
    assert (result.exit_code, result.stdout) == (0, "out: 6 frames of 16x16 at 10 fps\n")
    expected = Interpolator.from_pretrained(fixed_size_model)(*pictures[:2], frames=6, resize=True)
    assert np.array_equal(read_frames("out"), expected.frames)
    looped = run_giffy("interpolate", *arguments, "--resize", "--frames", 6, "--loop", "--overwrite")
    assert looped.stdout == "out: 10 frames of 16x16 at 10 fps\n"


def test_an_interrupt_leaves_no_file(run_giffy: Run, model: str, pictures: list[str], monkeypatch: pytest.MonkeyPatch):
    def iter_frames(self: Any, start: np.ndarray, *_: Any, **__: Any):
        yield start
        raise KeyboardInterrupt

    monkeypatch.setattr(Interpolator, "iter_frames", iter_frames)
    before = sorted(os.listdir())
    result = run_giffy("interpolate", *pictures[:2], "-o", "out.mp4", "--model", model)
    assert (result.exit_code, result.stderr.strip()) == (130, "giffy: interrupted")
    assert sorted(os.listdir()) == before


def test_an_unexpected_error_saves_its_traceback(
    run_giffy: Run, model: str, pictures: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def iter_frames(*_: Any, **__: Any):
        raise RuntimeError("it broke")

    monkeypatch.setattr(Interpolator, "iter_frames", iter_frames)
    arguments = [*pictures[:2], "-o", "out.mp4", "--model", model]
    result = run_giffy("interpolate", *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(
        r"giffy: RuntimeError: it broke \(test_interpolate.py:\d+\)\n  the traceback is in (\S+); --debug prints it\n",
        result.stderr,
    )
    (path,) = tmp_path.glob("giffy_ray-giffy-*.log")
    assert "in iter_frames" in path.read_text()
    debugged = run_giffy("interpolate", *arguments, "--debug")
    assert debugged.exit_code == 1
    assert debugged.stderr.startswith("Traceback")


@pytest.mark.parametrize(("clip_format", "suffix"), [("mp4", ".mp4"), ("gif", ".gif"), ("png", "")])
def test_a_folder_of_pairs(run_giffy: Run, model: str, pictures: list[str], clip_format: str, suffix: str):
    for folder, names in {"walk": ("1.png", "2.png"), "run": ("1.png", "2.png", "10.png")}.items():
        Path("pairs", folder).mkdir(parents=True)
        for number, name in enumerate(names):
            Image.fromarray(make_picture(number)).save(Path("pairs", folder, name))
    for number, side in enumerate("ab"):
        Image.fromarray(make_picture(5 + number)).save(f"pairs/cat_{side}.png")
    result = run_giffy("interpolate", "pairs", "-o", "clips", "--model", model, "--frames", 3, "--format", clip_format)
    assert (result.exit_code, result.stderr) == (0, "")
    names = ["cat", "run/1", "run/2", "walk"]
    assert result.stdout.splitlines()[-1].startswith("clips: 4 of 4 pairs in ")
    for name in names:
        assert Path(f"clips/{name}{suffix}").is_dir() == (clip_format == "png")
    if clip_format == "png":
        expected = Interpolator.from_pretrained(model)("pairs/cat_a.png", "pairs/cat_b.png", frames=3)
        assert np.array_equal(read_frames("clips/cat"), expected.frames)
    else:
        assert {str(path.relative_to("clips")) for path in Path("clips").rglob(f"*{suffix}")} == {
            f"{name}{suffix}" for name in names
        }


def test_a_pair_that_fails_does_not_stop_the_others(run_giffy: Run, model: str, pictures: list[str]):
    Path("pairs").mkdir()
    for number, name in enumerate(("good_a", "good_b", "bad_a", "old_1", "old_2", "lonely_start")):
        Image.fromarray(make_picture(number)).save(f"pairs/{name}.png")
    Path("pairs/bad_b.png").write_bytes(b"no picture")
    Path("clips").mkdir()
    Path("clips/old.mp4").write_bytes(b"earlier")
    options = ["--model", model, "--frames", 3]
    result = run_giffy("interpolate", "pairs", "-o", "clips", *options, "--json")
    assert result.exit_code == 1
    described = json.loads(result.stdout)
    assert [clip["output"] for clip in described["clips"]] == ["clips/good.mp4"]
    assert {failure["pair"] for failure in described["failed"]} == {"bad", "old"}
    assert [Path(skipped["path"]).name for skipped in described["skipped"]] == ["lonely_start.png"]
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert re.search(r"^giffy: skipped: .*lonely_start\.png: has no partner lonely_end$", lines[0])
    assert re.search(r"^giffy: failed: bad: .*bad_b\.png: is not an image", lines[1])
    assert re.search(r"^giffy: failed: old: clips/old\.mp4: exists already", lines[2])
    assert Path("clips/old.mp4").read_bytes() == b"earlier"
    Path("pairs/bad_b.png").unlink()
    again = run_giffy("interpolate", "pairs", "-o", "clips", *options, "--overwrite", "--quiet")
    assert (again.exit_code, again.stdout) == (0, "")
    assert len(again.stderr.splitlines()) == 2
    assert len(decode("clips/old.mp4")[0]) == 3


@pytest.mark.parametrize(("option", "value"), [("--times", 2), ("--to-fps", 20)])
def test_a_video_gets_more_frames(run_giffy: Run, model: str, pictures: list[str], option: str, value: int):
    Path("film.mp4").write_bytes(moving_video(0, 10, 10))
    arguments = ["film.mp4", "-o", "smooth.mp4", option, value, "--model", model]
    result = run_giffy("interpolate", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    described = json.loads(result.stdout)
    frames, fps = decode("smooth.mp4")
    assert (len(frames), fps) == (described["frames"], described["fps"])
    assert fps == 20
    assert 19 <= len(frames) <= 20
    assert (described["width"], described["height"]) == (64, 48)
    assert described["generated_frames"] > 0
    line = run_giffy("interpolate", *arguments, "--overwrite").stdout
    assert line.startswith(f"smooth.mp4: {len(frames)} frames of 64x48 at 20 fps, ")


def test_a_video_that_cannot_be_read(run_giffy: Run, model: str, pictures: list[str]):
    Path("film.mp4").write_bytes(b"no video")
    result = run_giffy("interpolate", "film.mp4", "-o", "out.mp4", "--times", 2, "--model", model)
    assert result.exit_code == 2
    assert result.stderr.startswith("giffy: film.mp4: ")
    assert len(result.stderr.splitlines()) == 1
    assert not Path("out.mp4").exists()


@hypothesis.given(
    strategies.integers(2, 9), strategies.integers(2, 40), strategies.floats(0.05, 20), strategies.booleans()
)
def test_the_plan_has_the_requested_length(pictures: int, frames: int, duration_s: float, loop: bool):
    segments = key_frames.plan_segments(pictures, frames, None, 10, loop)
    assert key_frames.count_frames(segments, loop) == (
        pictures * (frames - 1) if loop else (pictures - 1) * (frames - 1) + 1
    )
    total = round(duration_s * 10)
    if total < pictures:
        with pytest.raises(InputError, match="raise --duration or --fps"):
            key_frames.plan_segments(pictures, frames, duration_s, 10, loop)
        return
    segments = key_frames.plan_segments(pictures, frames, duration_s, 10, loop)
    assert key_frames.count_frames(segments, loop) == total
    assert len(segments) == pictures - (not loop)
    assert max(segments) - min(segments) <= 1
    assert min(segments) >= 2


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("clip.mp4", ["clip.mp4"]),
        ("new.mp4", []),
        ("nowhere", []),
        ("frames", ["frames/frame_0001.png", "frames/frame_12345.png"]),
        ("frames/walk.png", ["frames/walk_0001.png"]),
        ("frames/%d.png", ["frames/7.png"]),
        ("frames/a+%03d.png", ["frames/a+001.png"]),
    ],
)
def test_outputs_that_exist_are_found(tmp_path: Path, output: str, found: list[str]):
    names = ["frame_0001", "frame_12345", "frame_x", "walk_0001", "walk", "walk_2_0001", "7", "a+001", "aa001"]
    (tmp_path / "frames").mkdir()
    for name in ("clip.mp4", *(f"frames/{name}.png" for name in names)):
        (tmp_path / name).write_bytes(b"")
    assert key_frames.find_outputs(tmp_path / output) == [tmp_path / name for name in found]


def test_the_precision_is_that_of_the_network(run_giffy: Run, model: str, pictures: list[str]):
    arguments = [*pictures[:2], "-o", "out", "--model", model, "--frames", 3, "--device", "cpu"]
    result = run_giffy("interpolate", *arguments, "--dtype", "bfloat16", "--json")
    assert json.loads(result.stdout)["dtype"] == "bfloat16"
    expected = Interpolator.from_pretrained(model)(*pictures[:2], frames=3).frames.astype(int)
    assert np.abs(read_frames("out") - expected).mean() < 8
