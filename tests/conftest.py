"""Shared fixtures: generated video files, a tiny experiment, an isolated Ray head and S3 server, a completed search."""

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

# Checks annotated shapes and dtypes in this process; workers do not. Must run before these modules are imported.
_LEARNERS = [f"training.learners.{name}" for name in ("between", "cvae", "gan", "discriminators", "optimized_module")]
_CHECKED = ["core.tensor_types", "models", "evaluation.metrics", "evaluation.perceptual_metrics"]
install_import_hook(
    [f"giffy_ray.{name}" for name in (*_CHECKED, *_LEARNERS, "training.learners.losses")],
    "beartype.beartype",
)

# The duration of an example depends on the load of the machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Ray reads this on import. The token keeps other users out of the Ray cluster that tests start in this process.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = f"{tempfile.mkdtemp(prefix='giffy_ray-')}/token"
with open(os.environ["RAY_AUTH_TOKEN_PATH"], "x") as _file:
    _file.write(secrets.token_hex(32))

from giffy_ray.cluster.local import Head, local_head  # noqa: E402
from giffy_ray.config import Experiment, override  # noqa: E402

ROOT = Path(__file__).parent.parent
EXPERIMENT = "tests/tiny.yaml"
SMALL_BETWEEN = {
    "model.kind": "between",
    "model.widths": (4, 6, 8),
    "model.latent": 2,
    "clip.frames": 6,
    "clip.height": 16,
    "clip.width": 24,
}
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


# Session fixture that starts a Ray cluster -> the files whose tests use it.
_CLUSTER_FILES = {
    "head": ("test_jobs.py", "tracking/test_browser.py", "core/test_messages.py"),
    "local_ray": (
        "inference/test_bulk.py",
        "data/test_loader.py",
        "data/test_hostile_folder.py",
        "data/test_remote.py",
        "data/test_prepare.py",
        "test_chaos.py",
    ),
}
_GROUPS = {f"tests/{file}": fixture for fixture, files in _CLUSTER_FILES.items() for file in files}


def _group_of(node_id: str) -> str:
    """Returns the group of a test: one process of `make test` runs all of a group."""
    file = node_id.partition("::")[0]
    return _GROUPS.get(file, file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests on Ray clusters to the front: they take longest, and then the other process has work left."""
    for item in items:
        for fixture in _CLUSTER_FILES:
            if fixture in getattr(item, "fixturenames", ()) and _group_of(item.nodeid) != fixture:
                raise pytest.UsageError(f"{item.nodeid} uses {fixture}: add its file to _CLUSTER_FILES in {__file__}")
    order = {file: number for number, file in enumerate(_GROUPS)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Assigns whole groups to processes, in the order of the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    return GroupScheduling(config, log)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def scheduling_policy() -> Iterator[None]:
    """Asserts that a test leaves the process without real-time priority.

    Every later process would inherit it, and two busy ones would stop the machine. SVT-AV1, if root runs it, sets it
    for the thread that opens the encoder.
    """
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture
def tiny() -> Experiment:
    """A CVAE with a few thousand parameters on clips of 6 frames of 16x16."""
    return override(Experiment(), TINY)


@contextmanager
def in_float64() -> Iterator[None]:
    """Makes float64 the default dtype. CPUs round float32 differently, and a GAN amplifies that to percents."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    with local_head(cpus=2) as local:
        yield local


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URI of a bucket on a local S3 server. The environment points this process and its Ray cluster to it."""
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
    """A Ray cluster in this process, with two CPUs and about the smallest possible object store."""
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
    """uint8 [frames]: one grey level per source frame, distinct enough to survive encoding."""
    return (np.arange(frames) * 37 % 200 + 28).astype(np.uint8)


def encode(frames: np.ndarray, fps: float, kind: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """Encodes uint8 [time, height, width, 3] as a video file, with x264's default GOP and B-frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=int(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def grey_video(frames: int = 90, fps: float = 30, height: int = 64, width: int = 64, kind: str = "mp4") -> bytes:
    """Encodes a video whose frame i has the uniform grey level `grey_levels(frames)[i]`."""
    levels = grey_levels(frames)[:, None, None, None]
    return encode(np.broadcast_to(levels, (frames, height, width, 3)).copy(), fps, kind)


def moving_video(seed: int, frames: int, fps: float, height: int = 48, width: int = 64, kind: str = "mp4") -> bytes:
    """Encodes coarse random blocks that move sideways, as training data."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (4, 8, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((height // 4, width // 8, 1), np.uint8))
    return encode(np.stack([np.roll(picture, shift, axis=1) for shift in range(frames)]), fps, kind)


BROKEN = {"dogs/empty.mp4": b"", "dogs/text.mp4": b"not a video", "cats/cut.mp4": moving_video(99, 60, 30)[:1500]}


def submit(head: Head, *arguments: str, upload: bool = True) -> str:
    """Submits a job to the head, asserts that it succeeds, and returns its output.

    Args:
        head: The Ray head.
        arguments: The job file and its arguments.
        upload: Run in a copy of the checkout (--working-dir) instead of the checkout itself, where the head started.
    """
    working_dir = ["--working-dir", str(ROOT)] if upload else []
    command = ["ray", "job", "submit", *working_dir, "--", "python", *arguments]
    completed = subprocess.run(
        command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert completed.returncode == 0, completed.stdout[-6000:] + completed.stderr[-2000:]
    return completed.stdout


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with videos of mixed sizes, lengths, frame rates and containers, and three broken files."""
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
def tune_output(head: Head, videos: Path, storage: Path) -> str:
    """Output of a completed search in `storage`."""
    overrides = ["search.trials=2", f"data.root={videos}", "data.validation_fraction=0.3", f"storage={storage}"]
    return submit(head, "jobs/tune.py", EXPERIMENT, *overrides, "--compare-published")
