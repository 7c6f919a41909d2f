"""What tests share: real mp4 files made on the spot, a tiny experiment, a Ray head of their own, a search on it."""

from __future__ import annotations

import io
import logging
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Shapes and dtypes in annotations are checked here and never in workers. Before anything imports these modules.
_LEARNERS = [f"training.learners.{name}" for name in ("between", "cvae", "gan", "discriminators", "optimized_module")]
_CHECKED = ["core.tensor_types", "models", "evaluation.metrics", "evaluation.perceptual_metrics"]
install_import_hook(
    [f"giffy_ray.{name}" for name in (*_CHECKED, *_LEARNERS, "training.learners.losses")],
    "beartype.beartype",
)

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Ray reads this when it is imported. A token of our own keeps others out of the Ray that tests start in this process.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = f"{tempfile.mkdtemp(prefix='giffy_ray-')}/token"
with open(os.environ["RAY_AUTH_TOKEN_PATH"], "x") as _file:
    _file.write(secrets.token_hex(32))

from giffy_ray.cluster.local import Head, local_head  # noqa: E402
from giffy_ray.config import Experiment, override  # noqa: E402

ROOT = Path(__file__).parent.parent
EXPERIMENT = "tests/tiny.yaml"
TINY = {
    "clip.frames": 6,
    "clip.fps": 2.0,
    "clip.height": 16,
    "clip.width": 16,
    "model.image_widths": (2, 2, 2, 2),
    "model.image_hidden": 4,
    "model.image_code": 4,
    "model.video_widths": (2, 2, 2, 2),
    "model.video_hidden": 4,
    "model.latent": 3,
    "model.generator_widths": (2, 2, 2, 2, 2),
}


@pytest.fixture
def tiny() -> Experiment:
    """A CVAE of a few thousand parameters on clips of 6 frames of 16x16."""
    return override(Experiment(), TINY)


@contextmanager
def in_float64() -> Iterator[None]:
    """What processors round differently in float32 grows with each step, to percents with a GAN."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    with local_head(cpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The address of a bucket on an S3 server of our own, on loopback; this process and its Ray know where it is."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def local_ray(bucket: str) -> Iterator[None]:
    """A Ray that this process has joined, with two CPUs and about the smallest object store there is."""
    import ray

    with tempfile.TemporaryDirectory(prefix="giffy_ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


def grey_levels(frames: int) -> np.ndarray:
    """uint8 [frames]: a level for every source frame, far enough apart to be told from each other after encoding."""
    return (np.arange(frames) * 37 % 200 + 28).astype(np.uint8)


def encode(frames: np.ndarray, fps: float, kind: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """uint8 [time, height, width, 3] -> the bytes of a video file, with x264's default GOP and B-frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=int(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def grey_video(frames: int = 90, fps: float = 30, height: int = 64, width: int = 64, kind: str = "mp4") -> bytes:
    """A video whose frame i is all of grey level `grey_levels(frames)[i]`."""
    levels = grey_levels(frames)[:, None, None, None]
    return encode(np.broadcast_to(levels, (frames, height, width, 3)).copy(), fps, kind)


def moving_video(seed: int, frames: int, fps: float, height: int = 48, width: int = 64, kind: str = "mp4") -> bytes:
    """A smooth picture that moves sideways: something to learn from."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (4, 8, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((height // 4, width // 8, 1), np.uint8))
    return encode(np.stack([np.roll(picture, shift, axis=1) for shift in range(frames)]), fps, kind)


BROKEN = {"dogs/empty.mp4": b"", "dogs/text.mp4": b"not a video", "cats/cut.mp4": moving_video(99, 60, 30)[:1500]}


def submit(head: Head, *words: str, copied: bool = True) -> str:
    """Runs a job as a user does and returns what it printed; it must end well.

    `copied`: with --working-dir; else where the head was started, which is in the checkout.
    """
    command = ["ray", "job", "submit", *(["--working-dir", str(ROOT)] if copied else []), "--", "python", *words]
    done = subprocess.run(
        command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of mixed sizes, lengths, rates and containers, three of the files broken."""
    root = tmp_path_factory.mktemp("videos")
    kinds = [(60, 30, 48, 64, "mp4"), (25, 25, 64, 48, "mov"), (9, 15, 96, 128, "matroska"), (200, 60, 48, 48, "mp4")]
    for number in range(20):
        frames, fps, height, width, kind = kinds[number % len(kinds)]
        path = root / ("cats", "dogs")[number % 2] / f"{number} é.{'mkv' if kind == 'matroska' else kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(moving_video(number, frames, fps, height, width, kind))
    for name, content in BROKEN.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def tuned(head: Head, videos: Path, storage: Path) -> str:
    words = ["search.trials=2", f"data.root={videos}", "data.validation_fraction=0.3", f"storage={storage}"]
    return submit(head, "jobs/tune_cvae.py", EXPERIMENT, *words)
