"""Checks the interpolation of pictures against linear interpolation, plain stubs and closed forms."""

import gc
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from giffy_ray.config import Experiment, override, to_yaml
from giffy_ray.core.errors import InputError
from giffy_ray.core.tensor_types import NonFiniteOutput
from giffy_ray.inference.interpolator import Interpolator, frame_times, select_device
from giffy_ray.models import between
from giffy_ray.models.baselines import linear
from giffy_ray.models.motion import Motion, MotionEstimator
from giffy_ray.training import checkpoint_format, learners
from tests.conftest import SMALL_BETWEEN, TINY

CPU = torch.device("cpu")
SIZES = [(2, 2), (3, 5), (17, 31), (64, 64), (100, 300), (301, 40)]


@pytest.fixture
def untrained() -> Interpolator:
    """All heads of its network are zero, so it finds no motion."""
    experiment = override(Experiment(), SMALL_BETWEEN)
    return Interpolator(learners.build(experiment, CPU), experiment, CPU)


@pytest.fixture
def random_weights(untrained: Interpolator) -> Interpolator:
    rng = torch.Generator().manual_seed(0)
    for network in untrained.generator.networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1, generator=rng)
    return untrained


class CrossFade:
    """A generator of 6 frames of 16x16: linear interpolation, made brighter by its noise."""

    latent = 1
    networks: dict[str, nn.Module] = {}  # noqa: RUF012

    def generate(self, start: Tensor, end: Tensor, noise: Tensor, frames: int | None = None) -> Tensor:
        assert start.shape[1:] == end.shape[1:] == (16, 16, 3)
        return (linear(start, end, 6).float() + 20 * noise.view(-1, 1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def fixed() -> Interpolator:
    return Interpolator(CrossFade(), override(Experiment(), TINY), CPU)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def pair(height: int, width: int, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return noise(height, width, channels), noise(height, width, channels, seed=1)


def smooth(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 16
    waves = [np.sin(x + phase), np.cos(y - phase), np.sin(x + y + phase)]
    return (127.5 + 127.5 * np.stack(waves, -1)).round().astype(np.uint8)


# --- linear interpolation


@pytest.mark.parametrize("motion_size", [None, 8, 64, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_untrained_network_is_linear_interpolation_at_every_size(
    untrained: Interpolator, size: tuple[int, int], motion_size: int | None
):
    start, end = pair(*size)
    clip = untrained(start, end, frames=5, motion_size=motion_size, matching=False)
    assert clip.frames.shape == (5, *size, 3)
    for frame, time in zip(clip.frames, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert np.abs(frame - ((1 - time) * start.astype(float) + time * end)).max() <= 0.52  # rounding


@pytest.mark.parametrize("size", [(3, 5), (40, 70)])
def test_transparent_pictures_are_interpolated_premultiplied(untrained: Interpolator, size: tuple[int, int]):
    start, end = pair(*size, channels=4)
    start[0, 0, 3], end[0, 0, 3] = 0, 0
    start[0, 1, 3], end[0, 1, 3] = 0, 255
    frame = untrained(start, end, frames=5, matching=False).frames[1].astype(float)
    start_alpha, end_alpha = start[..., 3:] / 255, end[..., 3:] / 255
    alpha = 0.75 * start_alpha + 0.25 * end_alpha
    colour = 0.75 * start_alpha * start[..., :3] + 0.25 * end_alpha * end[..., :3]
    assert np.abs(frame[..., 3:] - 255 * alpha).max() <= 0.52
    visible = alpha[..., 0] >= 1 / 255
    assert np.abs(frame[visible][:, :3] - colour[visible] / alpha[visible]).max() <= 0.6
    assert not frame[0, 0].any()
    np.testing.assert_array_equal(frame[0, 1, :3], end[0, 1, :3])  # nothing of the invisible start


def test_pictures_of_any_kind_and_size_are_accepted(untrained: Interpolator, tmp_path: Path):
    from PIL import Image

    start, end = noise(16, 24), noise(16, 24, seed=1)
    Image.fromarray(start).save(tmp_path / "start.png")
    expected = untrained(start, end, frames=3).frames
    for first, last in [
        (tmp_path / "start.png", Image.fromarray(end)),
        (torch.from_numpy(start).permute(2, 0, 1), end / 255),
    ]:
        np.testing.assert_array_equal(untrained(first, last, frames=3).frames, expected)
    gray, transparent = noise(32, 48)[:, :, 0], noise(16, 24, 4)
    assert untrained(start, gray, frames=3).frames.shape == (3, 16, 24, 3)
    assert untrained(gray, transparent, frames=3).frames.shape == (3, 32, 48, 4)
    assert not np.array_equal(
        untrained(start, noise(30, 24), fit="crop")[2], untrained(start, noise(30, 24), fit="pad")[2]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pictures_keep_their_precision_if_the_network_has_less(untrained: Interpolator, dtype: torch.dtype):
    start, end = pair(40, 70)
    reduced = Interpolator(untrained.generator, untrained.experiment, CPU, dtype)
    clip = reduced(start, end, frames=3, matching=False)
    assert np.abs(clip[1] - (start / 2 + end / 2)).max() <= 0.52


# --- frames


@pytest.mark.parametrize("frames", [2, 3, 7, 30])
@pytest.mark.parametrize("channels", [3, 4])
def test_first_and_last_frame_are_the_pictures_bit_by_bit(random_weights: Interpolator, channels: int, frames: int):
    start, end = pair(19, 33, channels)  # with colours below an alpha of 0
    clip = random_weights(start, end, frames=frames)
    assert len(clip) == frames
    np.testing.assert_array_equal(clip[0], start)
    np.testing.assert_array_equal(clip[-1], end)
    if frames > 2:
        assert np.abs(clip[1].astype(int) - start).max() > 3


def test_frame_depends_only_on_its_time(random_weights: Interpolator):
    start, end = pair(24, 40)
    five, nine = random_weights(start, end, frames=5), random_weights(start, end, frames=9)
    assert np.abs(five.frames.astype(int) - nine.frames[::2]).max() <= 1
    some = list(random_weights.iter_frames(start, end, [0.75, 0.0, 0.25, 1.0, 0.75]))
    for frame, index in zip(some, (3, 0, 1, 4, 3), strict=True):
        assert np.abs(frame.astype(int) - five[index]).max() <= 1


@pytest.mark.parametrize("frames", [1, 0, -3])
def test_fewer_than_two_frames_are_refused(untrained: Interpolator, frames: int):
    with pytest.raises(InputError, match=rf"^frames: must be at least 2, the two pictures \(value {frames}\)$"):
        untrained(*pair(8, 8), frames=frames)


def test_read_only_pictures_are_used_without_a_warning(untrained: Interpolator):
    """Such as those that another process sent."""
    start, end = pair(8, 8)
    start.flags.writeable = end.flags.writeable = False
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frames = list(untrained.iter_frames(start, end, [0.0, 0.5, 1.0], matching=False))
    finally:
        torch.set_warn_always(False)
    assert np.abs(frames[1] - (start / 2 + end / 2)).max() <= 0.52


def test_memory_does_not_grow_with_the_number_of_frames(random_weights: Interpolator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(between, "_MAX_BATCH_PIXELS", 3 * 16 * 24)  # the motion of three frames at once
    start, end = pair(32, 48)

    def live_bytes() -> int:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is Tensor]
        arrays = [item for item in gc.get_objects() if type(item) is np.ndarray and item.shape == start.shape]
        return sum(tensor.nbytes for tensor in tensors) + sum(array.nbytes for array in arrays)

    live = [
        live_bytes()
        for number, _ in enumerate(random_weights.iter_frames(start, end, frame_times(200), motion_size=24))
        if number in (30, 33, 36, 180, 183, 186)
    ]
    assert max(live[3:]) <= max(live[:3])


@pytest.mark.parametrize("batch_frames", [1, 2, 5])
def test_motion_does_not_depend_on_the_batches(
    random_weights: Interpolator, batch_frames: int, monkeypatch: pytest.MonkeyPatch
):
    estimator = random_weights.generator
    assert isinstance(estimator, MotionEstimator)
    start, end = torch.rand(2, 1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    noise_row, times = torch.tensor([[0.3, -1.0]]), torch.linspace(0.1, 0.9, 7)
    (whole,) = estimator.iter_motion(start, end, noise_row, times)
    assert whole.flows.shape == (7, 4, 16, 24)
    monkeypatch.setattr(between, "_MAX_BATCH_PIXELS", batch_frames * 16 * 24 + 5)
    batches = list(estimator.iter_motion(start, end, noise_row, times))
    assert [len(batch.flows) for batch in batches] == [batch_frames] * (7 // batch_frames) + [7 % batch_frames] * (
        7 % batch_frames > 0
    )
    for index, field in enumerate(whole):
        torch.testing.assert_close(torch.cat([batch[index] for batch in batches]), field, atol=1e-5, rtol=1e-5)


def test_diverged_weights_are_reported_and_not_shown_as_black(random_weights: Interpolator):
    for network in random_weights.generator.networks.values():
        next(iter(network.parameters())).data.fill_(float("nan"))
    with pytest.raises(NonFiniteOutput, match="diverged"):
        random_weights(*pair(16, 24), frames=3, motion_size=24)


# --- samples


def test_first_sample_is_the_most_probable_clip_and_the_others_are_drawn(random_weights: Interpolator):
    start, end = pair(16, 24)
    single = random_weights(start, end, frames=4)
    first, second, third = random_weights(start, end, frames=4, samples=3)
    np.testing.assert_array_equal(first.frames, single.frames)
    clips = [first.frames, second.frames, third.frames, random_weights(start, end, 4, 2, seed=1)[1].frames]
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert (clip[1:-1] != other[1:-1]).any()
    again = random_weights(start, end, frames=4, samples=2)
    np.testing.assert_array_equal(again[1].frames, second.frames)
    np.testing.assert_array_equal(random_weights(start, end, frames=4, seed=7).frames, single.frames)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(untrained: Interpolator, samples: int):
    with pytest.raises(InputError, match=rf"^samples: must be at least 1 \(value {samples}\)$"):
        untrained(*pair(8, 8), samples=samples)


def test_clip_has_the_frame_rate(untrained: Interpolator):
    assert untrained(*pair(8, 8), frames=2).fps == 10
    assert [clip.fps for clip in untrained(*pair(8, 8), frames=2, samples=2, fps=24)] == [24, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motion_size": 0}, r"^motion_size: .*\(value 0\)"),
        ({"motion_size": -64}, r"^motion_size: .*\(value -64\)"),
        ({"seed": -1, "samples": 2}, r"^seed: .*\(value -1\)"),
        ({"fps": 0}, r"^fps: .*\(value 0\)"),
        ({"fit": "cut"}, r"^fit: .*\(value 'cut'\)"),
    ],
)
def test_options_that_cannot_be_used_are_refused(untrained: Interpolator, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        untrained(*pair(8, 8), frames=3, **options)


def test_pictures_that_cannot_be_used_are_named(untrained: Interpolator, tmp_path: Path):
    with pytest.raises(InputError, match=r"^end: has dtype int64"):
        untrained(noise(8, 8), noise(8, 8).astype(int))
    with pytest.raises(InputError, match=r"missing.png: cannot be read: No such file"):
        untrained(tmp_path / "missing.png", noise(8, 8))


# --- times


@pytest.mark.parametrize("frames", [2, 3, 30])
def test_ease_is_a_polynomial_of_time(frames: int):
    steps = np.arange(frames) / (frames - 1)
    np.testing.assert_allclose(frame_times(frames), steps, atol=1e-15)
    np.testing.assert_allclose(frame_times(frames, "in"), steps**2, atol=1e-15)
    np.testing.assert_allclose(frame_times(frames, "out"), 2 * steps - steps**2, atol=1e-15)
    np.testing.assert_allclose(frame_times(frames, "in-out"), 3 * steps**2 - 2 * steps**3, atol=1e-15)


@pytest.mark.parametrize("ease", ["linear", "in", "out", "in-out"])
def test_ease_begins_at_0_and_ends_at_1_and_never_turns_back(ease):
    times = frame_times(101, ease)
    assert times[0] == 0
    assert times[-1] == 1
    assert (np.diff(times) > 0).all()
    mirrored = {"in": "out", "out": "in"}.get(ease, ease)
    np.testing.assert_allclose(1 - np.array(times[::-1]), frame_times(101, mirrored), atol=1e-12)


def test_unknown_ease_is_refused():
    with pytest.raises(InputError, match=r"^ease: .*linear.*'bounce'"):
        frame_times(5, "bounce")  # type: ignore[arg-type]


# --- models of fixed size


def test_model_of_fixed_size_refuses_other_pictures(fixed: Interpolator, untrained: Interpolator):
    assert untrained.fixed_size is None
    assert fixed.fixed_size == (16, 16)
    with pytest.raises(InputError, match="generates only 16x16 pixels, and the pictures have 24x20; scale them with"):
        fixed(*pair(20, 24), frames=6)
    for frames in (5, 7, 30):
        with pytest.raises(InputError, match=rf"generates only 6 evenly spaced frames .*{frames}"):
            fixed(*pair(16, 16), frames=frames)
    with pytest.raises(InputError, match="generates only 6 evenly spaced frames"):
        list(fixed.iter_frames(*pair(16, 16), frame_times(6, "in")))


def test_model_of_fixed_size_generates_its_clips(fixed: Interpolator):
    start, end = pair(16, 16)
    first, second = fixed(start, end, frames=6, samples=2)
    expected = linear(torch.from_numpy(start)[None], torch.from_numpy(end)[None], 6)[0].numpy()
    np.testing.assert_array_equal(first.frames, expected)
    assert (second.frames != expected).any()


def test_pictures_are_scaled_for_a_model_of_fixed_size_on_request(fixed: Interpolator):
    start, end = np.full((40, 64, 3), 99, np.uint8), np.full((40, 64, 3), 50, np.uint8)
    end[:, 32:] = 200
    clip = fixed(start, end, frames=6, resize=True)
    assert clip.frames.shape == (6, 16, 16, 3)
    assert (clip[0] == 99).all()
    assert (clip[-1][:, :6] == 50).all()
    assert (clip[-1][:, 10:] == 200).all()


def test_transparent_pictures_are_composited_for_a_model_of_fixed_size(fixed: Interpolator):
    """Its networks know no transparency; hidden colours must not show."""
    start, end = pair(16, 16, channels=4)
    start[..., 3] = 0
    alpha = end[..., 3:] / 255
    clip = fixed(start, end, frames=6)
    assert (clip[0] == 255).all()
    assert np.abs(clip[-1] - (end[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.52


# --- the size that motion is estimated on


class StubEstimator:
    """Knows the true motion, a shift to the right, and returns it only for images of one width."""

    latent = 0
    networks: dict[str, nn.Module] = {}  # noqa: RUF012

    def __init__(self, right_width: int, shift_fraction: float):
        self.right_width, self.shift_fraction = right_width, shift_fraction
        self.widths: list[int] = []

    def generate(self, start, end, noise, frames=None):
        raise NotImplementedError

    def iter_motion(self, start: Tensor, end: Tensor, noise: Tensor, times: Tensor) -> Iterator[Motion]:
        height, width = start.shape[2:]
        self.widths.append(width)
        flow_px = self.shift_fraction * width if width == self.right_width else 0.0
        flows = torch.tensor([-flow_px, 0, flow_px, 0]).view(1, 4, 1, 1).expand(len(times), 4, height, width)
        zeros = torch.zeros(len(times), 4, height, width)
        yield Motion(flows, zeros[:, :1], zeros[:, 1:])


@pytest.mark.parametrize("motion_size", [None, 32, 2000])
@pytest.mark.parametrize("size", [(2, 2), (3, 40), (32, 64), (65, 30), (200, 300)])
def test_motion_is_estimated_on_images_no_larger_than_the_pictures(size: tuple[int, int], motion_size: int | None):
    stub = StubEstimator(0, 0)
    interpolator = Interpolator(stub, override(Experiment(), SMALL_BETWEEN), CPU)
    next(iter(interpolator.iter_frames(smooth(*size), smooth(*size), [0.5], motion_size=motion_size)))
    largest = min(size[1], motion_size or size[1])
    assert max(stub.widths) <= max(8, 8 * round(largest / 8))  # between needs multiples of 8
    assert not [width for width in stub.widths if width % 8]


@pytest.mark.parametrize("matching", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (3, 40), (32, 64), (130, 70)])
def test_still_picture_stays_still(untrained: Interpolator, size: tuple[int, int], matching: bool):
    picture = noise(*size)
    clip = untrained(picture, picture, frames=4, matching=matching)
    assert np.abs(clip.frames.astype(int) - picture).max() <= 1


def test_call_chooses_the_motion_size_once_for_all_samples(monkeypatch: pytest.MonkeyPatch, untrained: Interpolator):
    chosen = []

    def choose(_interpolator: Interpolator, start: np.ndarray, _end: np.ndarray) -> int:
        chosen.append(start.shape)
        return 64

    monkeypatch.setattr(Interpolator, "choose_motion_size", choose)
    untrained(*pair(70, 90), frames=3, samples=3)
    assert chosen == [(70, 90, 3)]
    untrained(*pair(70, 90), frames=3, motion_size=32)
    assert len(chosen) == 1


# --- devices and loading


def test_devices_are_selected_by_name(monkeypatch: pytest.MonkeyPatch):
    assert select_device("cpu") == CPU
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert select_device() == select_device("auto") == torch.device(expected)
        assert select_device(expected) == torch.device(expected)
    for name in ("cuda", "cuda:0", "mps", "tpu", "", "CPU", "cpu:x"):
        with pytest.raises(InputError, match=f"^device: '{name}' is not available here; use cpu or auto$"):
            select_device(name)


@pytest.fixture
def checkpoint(untrained: Interpolator, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / checkpoint_format.EXPERIMENT).write_text(to_yaml(untrained.experiment))
    for name, network in untrained.generator.networks.items():
        save_file(checkpoint_format.contiguous_weights(network), folder / checkpoint_format.network_file(name))
    checkpoint_format.write_manifest(folder)
    return folder


@pytest.mark.parametrize("as_type", [str, Path])
def test_from_pretrained_loads_a_checkpoint(checkpoint: Path, untrained: Interpolator, as_type: type):
    interpolator = Interpolator.from_pretrained(as_type(checkpoint), device="cpu")
    assert interpolator.device == CPU
    assert interpolator.experiment == untrained.experiment
    start, end = pair(20, 30)
    np.testing.assert_array_equal(interpolator(start, end, 4).frames, untrained(start, end, 4).frames)


def test_from_pretrained_explains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for source in ("betwen", str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(InputError, match=f"^model: there is none at '{source}'; give a checkpoint, a models:/"):
            Interpolator.from_pretrained(source, "cpu")
    with pytest.raises(InputError, match=r"^device: 'tpu' is not available"):
        Interpolator.from_pretrained("missing", "tpu")
    with pytest.raises(InputError, match=r"^dtype: must be one of float32, bfloat16, float16 \(value 'int8'\)$"):
        Interpolator.from_pretrained("missing", "cpu", "int8")  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"^model: set MLFLOW_TRACKING_URI to the MLflow server of 'models:/a@b'$"):
        Interpolator.from_pretrained("models:/a@b", "cpu")


def test_registered_model_without_mlflow_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in ("mlflow", "mlflow.exceptions", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)  # makes importing it fail
    with pytest.raises(InputError, match=r"MLflow is not installed; pip install 'giffy_ray\[train\]'$"):
        Interpolator.from_pretrained("models:/a@b", "cpu")


@pytest.mark.parametrize("damage", ["weights", "manifest", "experiment", "shape"])
def test_from_pretrained_refuses_damaged_checkpoints(checkpoint: Path, damage: str):
    weights = next(checkpoint.glob("*.safetensors"))
    match damage:
        case "weights":
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        case "manifest":
            (checkpoint / checkpoint_format.MANIFEST).unlink()
        case "experiment":
            (checkpoint / checkpoint_format.EXPERIMENT).write_text("model: [")
        case "shape":
            text = (checkpoint / checkpoint_format.EXPERIMENT).read_text()
            (checkpoint / checkpoint_format.EXPERIMENT).write_text(text.replace("latent: 2", "latent: 3"))
            checkpoint_format.write_manifest(checkpoint)
    with pytest.raises(InputError) as error:
        Interpolator.from_pretrained(checkpoint, "cpu")
    assert str(checkpoint) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_same_pictures_give_the_same_clip_in_every_process(random_weights: Interpolator):
    """Samples depend on the seed alone, and not on torch's global generator."""
    start, end = pair(16, 24)
    digests = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        clips = random_weights(start, end, frames=3, samples=2, seed=5)
        digests.add(hashlib.sha256(clips[1].frames.tobytes()).hexdigest())
    assert len(digests) == 1
