"""The service answers good requests with their own clips, and refuses all others in one sentence, within its limits."""

from __future__ import annotations

import concurrent.futures
import contextlib
import email
import email.policy
import io
import itertools
import json
import re
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from giffy_ray.core.errors import InputError
from giffy_ray.core.packaged import packaged_path
from giffy_ray.inference import service_guard, service_queue
from giffy_ray.inference.interpolator import Interpolator
from giffy_ray.inference.service import run_service
from giffy_ray.inference.service_guard import RateLimiter, ServiceLimits
from giffy_ray.inference.service_queue import find_model
from giffy_ray.inference.service_worker import ModelVersion, Options
from giffy_ray.tracking import uploader
from tests.inference.service_client import (
    FakeBackend,
    encode_image,
    hostile_images,
    pair,
    run_app,
    run_process,
    scene,
)

TOKEN = "s3cret"
MANY = ServiceLimits(requests_per_minute=10_000)


def post(address: str, files: Any = None, timeout: float = 60, headers: Any = None, **fields: Any) -> requests.Response:
    return requests.post(
        f"{address}/interpolate",
        files=pair(0) if files is None else files,
        data=fields,
        headers=headers,
        timeout=timeout,
    )


def error_of(response: requests.Response) -> str:
    body = response.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"] and len(body["error"]) < 400
    return body["error"]


def decode_video(content: bytes) -> np.ndarray:
    """Returns uint8 [time, height, width, 3]."""
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decode_animation(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def distance(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(image.astype(float) - other).mean())


def metric(address: str, name: str, **labels: str) -> float:
    text = requests.get(f"{address}/metrics", timeout=10).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def wait_for(condition: Any, timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The service without a model: everything in front of the workers."""
    with run_app(FakeBackend(), MANY) as address:
        yield address


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a test may replace by another one."""
    return Path(shutil.copytree(packaged_path("models", "between"), tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[str]:
    """The address of a service with a real model in a worker of Ray Serve."""
    with (
        tempfile.TemporaryDirectory(prefix="g-", dir="/tmp") as folder,
        run_process(str(checkpoint), Path(folder), token=TOKEN, limits=MANY) as (address, _),
    ):
        yield address


# ---------------------------------------------------------------------------------------------------- real clips

AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


def test_concurrent_requests_get_their_own_clips(real: str):
    def request(seed: int) -> np.ndarray:
        response = post(real, pair(seed), frames=5, fps=5, headers=AUTHORIZED)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "video/mp4"
        return decode_video(response.content)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clips = list(pool.map(request, range(8)))
    starts, ends = ([scene(2 * seed + offset) for seed in range(8)] for offset in (0, 1))
    for seed, clip in enumerate(clips):
        assert clip.shape == (5, 48, 64, 3)
        assert np.argmin([distance(clip[0], start) for start in starts]) == seed
        assert np.argmin([distance(clip[-1], end) for end in ends]) == seed
        assert distance(clip[0], starts[seed]) < 8 and distance(clip[-1], ends[seed]) < 8


def test_clips_are_those_of_the_library(real: str, checkpoint: Path):
    """Frames from the service equal the interpolator's, for each sample, apart from lossy compression."""
    options = {"frames": 6, "samples": 2, "seed": 3, "size": 48, "ease": "in", "quality": 100}
    response = post(real, pair(1), headers=AUTHORIZED, preview=True, **options)
    parts = parse_multipart(response)
    names = [f"sample-{sample}/frame-{frame:04}.webp" for sample in (1, 2) for frame in range(1, 7)]
    assert list(parts) == [*names[:6], "sample-1.mp4", *names[6:], "sample-2.mp4"]
    resized = [np.asarray(Image.fromarray(scene(seed)).resize((48, 36), Image.Resampling.LANCZOS)) for seed in (2, 3)]
    interpolator = Interpolator.from_pretrained(checkpoint, "cpu")
    times = np.linspace(0, 1, 6) ** 2
    for sample in range(2):
        expected = np.stack(list(interpolator.iter_frames(*resized, times.tolist(), sample=sample, seed=3)))
        frames = np.stack([decode_animation(parts[name])[0] for name in names[6 * sample : 6 * sample + 6]])
        assert distance(frames, expected) < 4
        assert distance(decode_video(parts[f"sample-{sample + 1}.mp4"]), expected) < 6
    single = post(real, pair(1), headers=AUTHORIZED, **{**options, "samples": 1, "first_sample": 2})
    repeated, first = decode_video(single.content), decode_video(parts["sample-2.mp4"])
    assert distance(repeated, first) < 1  # a CPU does not round the same way every time


def parse_multipart(response: requests.Response) -> dict[str, bytes]:
    assert response.status_code == 200, response.text
    header = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(header + response.content, policy=email.policy.HTTP)
    assert message.get_content_type() == "multipart/mixed"
    parts = {str(part.get_filename()): part for part in message.iter_parts()}
    contents = {name: part.get_content() for name, part in parts.items()}
    for name, part in parts.items():
        if isinstance(contents[name], bytes):
            assert int(part["content-length"]) == len(contents[name])
    return contents


@pytest.mark.parametrize("file_format", ["gif", "webp"])
def test_animations_loop_back_to_the_start(real: str, file_format: str):
    response = post(real, pair(2), headers=AUTHORIZED, frames=4, format=file_format, loop=True, fps=10)
    assert response.headers["content-type"] == f"image/{file_format}"
    clip = decode_animation(response.content)
    assert len(clip) == 6
    start, end = scene(4), scene(5)
    assert np.argmin([distance(frame, start) for frame in clip]) == 0
    assert np.argmin([distance(frame, end) for frame in clip]) == 3
    assert distance(clip[0], start) < 20 and distance(clip[3], end) < 20  # a GIF has 256 colours


def test_several_samples_are_a_zip_file(real: str):
    response = post(real, pair(3), headers=AUTHORIZED, frames=3, samples=2)
    assert response.headers["content-disposition"] == 'attachment; filename="samples.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["sample-1.mp4", "sample-2.mp4"]
        assert all(len(decode_video(archive.read(name))) == 3 for name in archive.namelist())


def test_reload_under_load_loses_no_request(real: str, checkpoint: Path):
    first_label = requests.get(f"{real}/info", timeout=10).json()["model"]

    def request(seed: int) -> tuple[str, float]:
        response = post(real, pair(seed), headers=AUTHORIZED, frames=4)
        assert response.status_code == 200, response.text
        return response.headers["x-giffy-model"], distance(decode_video(response.content)[0], scene(2 * seed))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(request, seed) for seed in range(12)]
        shutil.rmtree(checkpoint)
        shutil.copytree(packaged_path("models", "between-sharp"), checkpoint)
        reloaded = requests.post(f"{real}/reload", headers=AUTHORIZED, timeout=120)
        assert reloaded.json()["changed"], reloaded.text
        later = [pool.submit(request, seed) for seed in range(12, 16)]
        answers = [future.result() for future in futures]
        later_labels = {future.result()[0] for future in later}
    second_label = reloaded.json()["model"]
    assert second_label != first_label
    assert {label for label, _ in answers} <= {first_label, second_label}
    assert later_labels == {second_label}
    assert max(error for _, error in answers) < 8
    assert not requests.post(f"{real}/reload", headers=AUTHORIZED, timeout=60).json()["changed"]
    (checkpoint / "manifest.json").write_text("{}")
    failed = requests.post(f"{real}/reload", headers=AUTHORIZED, timeout=60)
    assert failed.status_code == 502 and second_label in error_of(failed)
    assert request(0)[0] == second_label


# ---------------------------------------------------------------------------------------------- hostile requests


@pytest.mark.parametrize("name", hostile_images())
def test_hostile_image_is_refused(address: str, name: str):
    content, pattern = hostile_images()[name]
    response = post(address, {"start": content or ("x.png", b""), "end": pair(0)["end"]})
    assert response.status_code == 422
    assert re.match(pattern, error_of(response))
    swapped = post(address, {"start": pair(0)["start"], "end": content or ("x.png", b"")})
    assert swapped.status_code == 422 and error_of(swapped).startswith("end: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 1}, "frames: input should be greater than or equal to 2 (value '1')"),
        ({"frames": 241}, "frames: must be at most 240 (value 241)"),
        ({"frames": "10; rm -rf /"}, "frames: input should be a valid integer"),
        ({"frames": "9" * 500}, "frames: "),
        ({"samples": 9}, "samples: must be at most 8 (value 9)"),
        ({"fps": "nan"}, "fps: input should be a finite number (value 'nan')"),
        ({"fps": 0}, "fps: input should be greater than 0 (value '0')"),
        ({"format": "exe"}, "format: input should be 'mp4', 'gif' or 'webp' (value 'exe')"),
        ({"quality": 101}, "quality: "),
        ({"seed": -1}, "seed: "),
        ({"size": 8}, "size: "),
        ({"url": "http://169.254.169.254/"}, "'url' is no option; the options are frames, samples"),
        ({"frames\r\nX-Evil: 1": "2"}, "is no option"),
        ({"frames": ["2", "3"]}, "'frames' is given twice"),
        ({"ease": "\r\nX-Evil: 1\r\n\r\n<script>"}, r"'\r\nX-Evil: 1\r\n\r\n<script>'"),
        ({"frames": 200, "samples": 8, "loop": True}, None),  # good: 10 million pixels
    ],
)
def test_options_are_checked(address: str, fields: dict, message: str | None):
    response = post(address, **fields)
    assert "x-evil" not in response.headers
    if message is None:
        assert response.status_code == 200
    else:
        assert response.status_code == 422
        assert message in error_of(response)


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        ({"start": b"x"}, 422, "end: is missing; send two images, start and end"),
        ([("start", b"x"), ("start", b"x"), ("end", b"x")], 422, "'start' is given twice"),
        ({**pair(0), "third": b"x"}, 422, "'third' is a file; the images are start and end"),
        ([(name, b"x") for name in "abcd"], 400, "Too many files"),
    ],
)
def test_form_needs_two_images(address: str, files: Any, status: int, message: str):
    response = post(address, files)
    assert response.status_code == status
    assert message in error_of(response)


def test_other_bodies_are_refused(address: str):
    url = f"{address}/interpolate"
    text = requests.post(url, data={"start": "a", "end": "b"}, timeout=10)
    assert (text.status_code, error_of(text)) == (415, "expected multipart/form-data with the images start and end")
    broken = {"content-type": "multipart/form-data; boundary=x"}
    for body in (
        b"",
        b"--x\r\nnonsense",
        b"--y\r\n\r\n--y--",
        b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--",
    ):
        response = requests.post(url, data=body, headers=broken, timeout=10)
        assert 400 <= response.status_code < 500 and error_of(response)
    no_boundary = requests.post(url, data=b"x", headers={"content-type": "multipart/form-data"}, timeout=10)
    assert no_boundary.status_code == 400 and "boundary" in error_of(no_boundary)
    as_text = requests.post(url, files={"start": (None, "text"), "end": (None, "text")}, timeout=10)
    assert as_text.status_code == 422 and error_of(as_text) == "start: is text; send it as a file"


def test_file_name_is_never_used(address: str, tmp_path: Path):
    evil = f"../../../..{tmp_path}/evil.png"
    files = {name: (evil, content, "image/png\r\nX-Evil: 1") for name, content in pair(0).items()}
    response = post(address, files)
    assert response.status_code in (200, 400)
    assert not list(tmp_path.iterdir()) and "evil" not in str(response.headers)
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{evil}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in pair(0).items()
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}
    raw = requests.post(f"{address}/interpolate", data=body + b"--x--\r\n", headers=headers, timeout=10)
    assert raw.status_code == 200 and "evil" not in str(raw.headers)
    assert not list(tmp_path.iterdir())


def test_clip_has_a_pixel_budget(address: str):
    big = encode_image(np.zeros((2000, 3000, 3), np.uint8))
    response = post(address, {"start": big, "end": big}, frames=30)
    assert response.status_code == 422
    assert error_of(response).startswith("30 frames of 3000x2000 are 180 million pixels; the limit is 150 million")
    assert post(address, {"start": big, "end": big}, frames=25).status_code == 200
    assert post(address, {"start": big, "end": big}, frames=30, size=1000).status_code == 200


# ------------------------------------------------------------------------------------------------------- limits


def test_oversized_bodies_are_refused_early():
    limits = ServiceLimits(upload_mb=1, header_s=3)
    with run_app(FakeBackend(), limits) as address:
        files = {"start": bytes(5 * 2**20), "end": b"x"}
        stated = post(address, files)
        assert (stated.status_code, error_of(stated)) == (
            413,
            "the request is larger than 1 MiB; scale the images down",
        )
        prepared = requests.Request("POST", f"{address}/interpolate", files=files).prepare()
        assert isinstance(prepared.body, bytes)
        chunks = [prepared.body[begin : begin + 50_000] for begin in range(0, len(prepared.body), 50_000)]
        headers = {"content-type": prepared.headers["content-type"]}
        chunked = requests.post(f"{address}/interpolate", data=iter(chunks), headers=headers, timeout=10)
        assert chunked.status_code == 413
        endless = itertools.chain(chunks[:1], itertools.repeat(b"a" * 2**16))
        begin_s = time.monotonic()
        with contextlib.suppress(requests.ConnectionError):  # or the answer, if it is read before the connection ends
            assert requests.post(f"{address}/interpolate", data=endless, headers=headers, timeout=30).status_code == 413
        assert time.monotonic() - begin_s < 10
        assert metric(address, "giffy_requests_total", path="/interpolate", status="413") == 3
        assert post(address).status_code == 200


def open_socket(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def format_request(**fields: str) -> bytes:
    """Returns a good request as it is sent."""
    prepared = requests.Request("POST", "http://localhost/interpolate", files=pair(0), data=fields).prepare()
    assert isinstance(prepared.body, bytes)
    headers = "".join(f"{name}: {value}\r\n" for name, value in prepared.headers.items())
    return f"POST /interpolate HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode() + prepared.body


def is_closed_by_peer(connection: socket.socket) -> bool:
    try:
        return connection.recv(2**16) == b""
    except ConnectionResetError:
        return True


def test_slow_clients_are_cut_off():
    limits = ServiceLimits(header_s=1, upload_s=2, stall_s=1)
    with run_app(FakeBackend(size_bytes=30_000_000), limits) as address:
        begin_s = time.monotonic()
        with open_socket(address) as silent, open_socket(address) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(4):  # a byte now and then does not help
                time.sleep(0.3)
                with contextlib.suppress(OSError):
                    slow.sendall(b"a")
            assert is_closed_by_peer(silent) and is_closed_by_peer(slow)
        assert time.monotonic() - begin_s < 5
        with open_socket(address) as slow:
            head = b"POST /interpolate HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            slow.sendall(head + b"Content-Length: 1000\r\n\r\n--x\r\n")
            answer = b"".join(iter(lambda: slow.recv(2**16), b""))  # until the service closes the connection
            assert b" 408 " in answer.partition(b"\r\n")[0] and b"the upload took longer than 2 s" in answer
        with open_socket(address) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(format_request())
            wait_for(lambda: metric(address, "giffy_requests_total", path="/interpolate") == 2)
            assert metric(address, "giffy_open_requests") == 0


def test_full_queue_asks_to_come_back():
    backend = FakeBackend(delay_s=1.5)
    with run_app(backend, ServiceLimits(queue=4)) as address:
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            responses = list(pool.map(lambda _: post(address), range(10)))
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) == 4 and statuses.count(429) == 6
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.headers["retry-after"] == "5"
        assert error_of(refused) == "the service is busy with 4 requests; try again in 5 s"
        assert metric(address, "giffy_open_requests") == metric(address, "giffy_waiting_requests") == 0
        assert post(address).status_code == 200


def test_rate_of_a_client_is_limited():
    with run_app(FakeBackend(), ServiceLimits(requests_per_minute=3)) as address:
        statuses = [post(address).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        forged = post(address, headers={"x-forwarded-for": "1.2.3.4"})
        assert forged.status_code == 429 and 0 < int(forged.headers["retry-after"]) <= 20
        assert requests.get(f"{address}/healthz", timeout=10).status_code == 200


def test_token_bucket_refills_at_its_rate(monkeypatch: pytest.MonkeyPatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(service_guard, "time", SimpleNamespace(monotonic=lambda: now.s))
    limiter = RateLimiter(6)
    assert [limiter.take("a") for _ in range(7)] == [0, 0, 0, 0, 0, 0, 10.0]  # a token each 10 s
    assert limiter.take("b") == 0
    now.s += 4
    assert limiter.take("a") == pytest.approx(6)
    now.s += 6
    assert limiter.take("a") == 0
    now.s += 1000
    assert [limiter.take("a") for _ in range(7)].count(0) == 6
    for client in range(20_000):
        limiter.take(str(client))
    assert len(limiter._buckets) == 10_000


def test_request_has_a_time_limit_and_ends_with_its_client():
    backend = FakeBackend()
    with run_app(backend, ServiceLimits(request_s=2)) as address:
        wait_for(lambda: post(address).status_code == 200)  # the processes that decode images have started
        backend.delay_s = 30
        response = post(address)
        assert response.status_code == 504
        assert error_of(response) == "took longer than 2 s; ask for fewer frames or a smaller size"
        assert backend.cancelled == 1
    with run_app(backend) as address:
        for cancelled, preview in ((2, False), (3, True)):
            with open_socket(address) as client:
                client.sendall(format_request(preview=str(preview).lower()))
                wait_for(lambda cancelled=cancelled: backend.started == cancelled + 1)
            wait_for(lambda cancelled=cancelled: backend.cancelled == cancelled)
        wait_for(lambda: metric(address, "giffy_requests_total", path="/interpolate", status="499") == 2)
        assert metric(address, "giffy_open_requests") == 0


# ------------------------------------------------------------------------------------- token, sites, headers, routes


def test_token_is_asked_for():
    with run_app(FakeBackend(), token=TOKEN) as address:
        missing = post(address)
        assert (missing.status_code, missing.headers["www-authenticate"]) == (401, "Bearer")
        assert error_of(missing) == "a token is needed, as in Authorization: Bearer TOKEN"
        for wrong in (
            "Bearer wrong",
            f"Bearer {TOKEN}x",
            TOKEN,
            f"Basic {TOKEN}",
            "Bearer é".encode().decode("latin-1"),
        ):
            response = post(address, headers={"authorization": wrong})
            assert (response.status_code, error_of(response)) == (401, "the token is wrong")
        assert post(address, headers=AUTHORIZED).status_code == 200
        assert requests.post(f"{address}/reload", timeout=10).status_code == 401
        assert requests.post(f"{address}/reload", headers=AUTHORIZED, timeout=10).json()["changed"] is False
        for path in ("/", "/info", "/healthz", "/metrics"):
            assert requests.get(f"{address}{path}", timeout=10).status_code == 200


def test_reload_needs_a_token(address: str):
    response = requests.post(f"{address}/reload", timeout=10)
    assert (response.status_code, error_of(response)) == (403, "reloads need a service that was started with a token")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:80"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "localhost:80", "origin": "http://localhost:80"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[bad"}, 403),
    ],
)
def test_other_web_sites_are_refused(address: str, headers: dict[str, str], status: int):
    assert post(address, headers=headers).status_code == status


def test_other_hosts_are_allowed_beyond_loopback():
    with run_app(FakeBackend(), is_loopback=False) as address:
        assert post(address, headers={"host": "studio.example"}).status_code == 200
        assert post(address, headers={"host": "studio.example", "origin": "http://a.example"}).status_code == 403


@pytest.mark.parametrize(
    "path", ["/", "/app.js", "/metrics", "/openapi.json", "/docs", "/../../etc/passwd", "/nothing"]
)
def test_every_response_has_security_headers(address: str, path: str):
    with open_socket(address) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head = b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")[0].decode().lower()
    is_page = path in ("/", "/app.js", "/metrics", "/openapi.json")
    assert head.splitlines()[0].split()[1] == ("200" if is_page else "404")
    assert "default-src 'none'; script-src 'self'" in head
    assert "x-content-type-options: nosniff" in head and "frame-ancestors 'none'" in head
    assert "server:" not in head


def test_failure_of_the_workers_is_reported_without_details():
    backend = FakeBackend()
    with run_app(backend) as address:
        backend.failure = RuntimeError("secret path")
        response = post(address)
        assert (response.status_code, error_of(response)) == (500, "the service failed; its log says why")
        assert "default-src" in response.headers["content-security-policy"]
        backend.failure = InputError("this model generates only 64x64 pixels")
        response = post(address)
        assert (response.status_code, error_of(response)) == (422, "this model generates only 64x64 pixels")
        assert metric(address, "giffy_requests_total", path="/interpolate", status="500") == 1


def test_error_after_the_start_is_the_last_part():
    class FailingBackend(FakeBackend):
        async def generate(self, *arguments: Any) -> Any:
            async for part in super().generate(*arguments):
                yield part
                self.failure = RuntimeError("secret path")

    with run_app(FailingBackend()) as address:
        parts = parse_multipart(post(address, preview=True, samples=2))
        assert list(parts) == ["sample-1.mp4", "error"]
        assert json.loads(parts["error"]) == {"error": "the service failed; its log says why"}


def test_openapi_describes_the_options(address: str):
    schema = requests.get(f"{address}/openapi.json", timeout=10).json()
    assert set(schema["paths"]) == {"/info", "/healthz", "/metrics", "/reload", "/interpolate"}
    operation = schema["paths"]["/interpolate"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"start", "end", *Options.model_fields}
    assert form["required"] == ["start", "end"]
    assert {"200", "401", "413", "422", "429", "504"} <= set(operation["responses"])


def test_metrics_count_every_request():
    with run_app(FakeBackend()) as address:
        for _ in range(3):
            post(address)
        post(address, frames=1)
        requests.get(f"{address}/wp-login.php", timeout=10)
        assert metric(address, "giffy_requests_total", path="/interpolate", status="200") == 3
        assert metric(address, "giffy_requests_total", path="/interpolate", status="422") == 1
        assert metric(address, "giffy_requests_total", path="other", status="404") == 1
        assert metric(address, "giffy_request_seconds_count", path="/interpolate") == 4
        label = requests.get(f"{address}/info", timeout=10).json()["model"]
        assert metric(address, "giffy_model_info", model=label) == 1
        assert metric(address, "process_resident_memory_bytes") > 1e6


# ------------------------------------------------------------------------------------------------------- reloads


def test_requests_in_progress_keep_their_model(monkeypatch: pytest.MonkeyPatch):
    versions = [ModelVersion("m", "model 1")]
    monkeypatch.setattr(service_queue, "find_model", lambda address: versions[-1])
    backend = FakeBackend(delay_s=1)
    with run_app(backend, token=TOKEN) as address, concurrent.futures.ThreadPoolExecutor(6) as pool:
        early = [pool.submit(post, address, headers=AUTHORIZED) for _ in range(6)]  # two run, four wait
        wait_for(lambda: metric(address, "giffy_waiting_requests") == 4)
        versions.append(ModelVersion("m", "model 2"))
        assert requests.post(f"{address}/reload", headers=AUTHORIZED, timeout=10).json() == {
            "model": "model 2",
            "changed": True,
        }
        late = post(address, headers=AUTHORIZED)
        assert late.headers["x-giffy-model"] == "model 2" and late.content.endswith(b"model 2")
        for future in early:
            assert future.result().headers["x-giffy-model"] == "model 1"
            assert future.result().content.endswith(b"model 1")
        backend.failure = InputError("no such weights")
        versions.append(ModelVersion("m", "model 3"))
        failed = requests.post(f"{address}/reload", headers=AUTHORIZED, timeout=10)
        assert (failed.status_code, error_of(failed)) == (502, "requests still get model 2: no such weights")
        backend.failure = None
        assert post(address, headers=AUTHORIZED).headers["x-giffy-model"] == "model 2"
        assert metric(address, "giffy_model_reloads_total", outcome="failure") == 1


def test_alias_is_resolved_to_a_version(monkeypatch: pytest.MonkeyPatch):
    class Client:
        def get_model_version_by_alias(self, name: str, alias: str) -> SimpleNamespace:
            if alias != "champion":
                raise RuntimeError("no such alias at http://user:password@host")
            return SimpleNamespace(version="7")

    monkeypatch.setattr(uploader, "create_client", lambda uri: Client())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        find_model("models:/giffy@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert find_model("models:/giffy@champion") == ModelVersion("models:/giffy/7", "giffy 7")
    assert find_model("models:/giffy/3") == ModelVersion("models:/giffy/3", "giffy 3")
    with pytest.raises(InputError, match=r"models:/giffy@best.*no such alias") as raised:
        find_model("models:/giffy@best")
    assert "password" not in str(raised.value)
    first, second = find_model("between"), find_model("between-sharp")
    assert first.source == "between" and first.label.startswith("between ") and first.label != second.label


# --------------------------------------------------------------------------------------------------- run_service


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "a b"}, "token: must consist of printable ASCII"),
        ({"token": ""}, "token: must consist"),
        ({"workers": 0}, "workers: must be at least 1"),
        ({"host": "192.0.2.1"}, r"port: 192\.0\.2\.1:8000 cannot be used"),  # an address of no machine
        ({"port": 70_000}, "port: must be 0 to 65535"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        run_service(**arguments)


def test_port_in_use_is_reported():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InputError, match=r"port: 127\.0\.0\.1:\d+ cannot be used"):
            run_service(port=other.getsockname()[1])


def test_limits_must_be_positive():
    with pytest.raises(InputError, match=r"limits\.queue: must be above 0 \(value 0\)"):
        ServiceLimits(queue=0)


def test_sandboxes_are_few_and_end_with_the_service():
    def count_sandboxes() -> int:
        children = psutil.Process().children()
        return sum(
            "giffy_ray.inference.image_sandbox" in " ".join(child.cmdline())
            for child in children
            if child.status() != psutil.STATUS_ZOMBIE
        )

    before = count_sandboxes()
    with run_app(FakeBackend()) as address, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: post(address, pair(seed)), range(16)))
        assert 1 <= count_sandboxes() - before <= 2
    assert count_sandboxes() == before
