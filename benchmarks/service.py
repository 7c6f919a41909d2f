"""The service under load: 200 concurrent requests, good and hostile, with a reload of the model in the middle.

    python benchmarks/service.py [--requests 200] [--rounds 4] [--size 256] [--frames 8] [--workers 1]

In every round all requests start at the same moment: three of five send their own pair of images, the others hostile
files, wrong options and oversized bodies. Checks that each good request gets its own clip, and each bad one an answer
4xx that says why. From the second round on, the model is replaced while requests are in progress, and a quarter of
them starts after that.

Prints the latency of both kinds, the rate, and the memory (proportional set size) of the service's processes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil
import requests

from giffy_ray.core.packaged import packaged_path
from giffy_ray.inference.service_guard import ServiceLimits
from tests.inference.service_client import hostile_images, pair, run_process, scene

TOKEN = "token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
MODELS = ("between", "between-sharp")
UPLOAD_MB = 16
SAMPLE_S = 0.5  # between measurements of memory


class Answer(NamedTuple):
    """The outcome of a request."""

    is_good: bool  # whether it should succeed
    problem: str | None
    latency_s: float
    status: int
    model: str = ""


def send_good(address: str, seed: int, size: int, frames: int) -> Answer:
    """Sends a pair of its own, and checks that the clip begins and ends with it."""
    files = pair(seed, size * 3 // 4, size)
    begin_s = time.monotonic()
    response = requests.post(
        f"{address}/interpolate", files=files, data={"frames": frames}, headers=HEADERS, timeout=600
    )
    latency_s = time.monotonic() - begin_s
    if response.status_code != 200:
        return Answer(True, response.text, latency_s, response.status_code)
    with av.open(io.BytesIO(response.content)) as container:
        clip = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    expected = [scene(2 * seed + offset, size * 3 // 4, size).astype(float) for offset in (0, 1)]
    errors = [np.abs(frame - image).mean() for frame, image in zip((clip[0], clip[-1]), expected, strict=True)]
    is_own = len(clip) == frames and max(errors) < 6  # other pairs differ by 60 on average
    problem = None if is_own else f"{len(clip)} frames, differences {errors}"
    return Answer(True, problem, latency_s, 200, response.headers["x-giffy-model"])


def send_hostile(address: str, number: int) -> Answer:
    """Sends one of the hostile requests, in turn, and checks that the answer says why it is refused."""
    good = pair(number)
    images = list(hostile_images().values())
    kinds = [
        *({"files": {"start": ("x", content), "end": good["end"]}} for content, _ in images),
        {"files": {"start": ("x", bytes((UPLOAD_MB + 4) * 2**20)), "end": good["end"]}},
        {"files": good, "data": {"frames": 10**6}},
        {"files": good, "data": {"url": "http://169.254.169.254/"}},
        {"files": good, "headers": {"authorization": "Bearer wrong"}},
        {"data": b"nonsense", "headers": {**HEADERS, "content-type": "multipart/form-data; boundary=x"}},
        {"data": iter([b"a" * 2**20] * (UPLOAD_MB + 4)), "headers": {**HEADERS, "content-type": "multipart/form-data"}},
    ]
    begin_s = time.monotonic()
    response = requests.post(
        f"{address}/interpolate", **{"headers": HEADERS, **kinds[number % len(kinds)]}, timeout=600
    )
    latency_s = time.monotonic() - begin_s
    try:
        is_refused = 400 <= response.status_code < 500 and bool(response.json()["error"])
    except (ValueError, KeyError):
        is_refused = False
    return Answer(False, None if is_refused else response.text[:200], latency_s, response.status_code)


class MemoryMonitor(threading.Thread):
    """Samples the memory of a process and of all below it, by kind."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._process, self._is_stopped = psutil.Process(pid), threading.Event()
        self.samples: list[dict[str, float]] = []

    def measure_mb(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                command, pss = " ".join(process.cmdline()), process.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
            if process == self._process:
                kind = "server"
            elif "image_sandbox" in command:
                kind = "sandboxes"
            elif "InterpolationWorker" in command:
                kind = "workers"
            else:
                kind = "Ray"
            totals[kind] += pss / 2**20
        return dict(totals)

    def run(self) -> None:
        while not self._is_stopped.wait(SAMPLE_S):
            self.samples.append(self.measure_mb())

    def take(self) -> dict[str, float]:
        """Returns the peak of each kind since the last call."""
        samples, self.samples = self.samples, []
        kinds = sorted({kind for sample in samples for kind in sample})
        return {kind: max(sample.get(kind, 0) for sample in samples) for kind in kinds}

    def stop(self) -> None:
        self._is_stopped.set()
        self.join()


def run_round(address: str, number: int, options: argparse.Namespace, checkpoint: Path) -> list[Answer]:
    barrier, is_replaced = threading.Barrier(options.requests + 1), threading.Event()

    def send(index: int) -> Answer:
        barrier.wait()
        if number and index >= options.requests * 3 // 4:
            is_replaced.wait()
        seed = number * options.requests + index
        if index % 5 < 3:
            return send_good(address, seed, options.size, options.frames)
        return send_hostile(address, seed)

    with concurrent.futures.ThreadPoolExecutor(options.requests) as pool:
        futures = [pool.submit(send, index) for index in range(options.requests)]
        barrier.wait()
        if number:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
            replace_model(address, checkpoint, MODELS[number % len(MODELS)])
            is_replaced.set()
        return [future.result() for future in futures]


def replace_model(address: str, checkpoint: Path, name: str) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(packaged_path("models", name), checkpoint)
    begin_s = time.monotonic()
    response = requests.post(f"{address}/reload", headers=HEADERS, timeout=300)
    response.raise_for_status()
    print(f"  reload under load: {response.json()} after {time.monotonic() - begin_s:.1f} s")


def print_answers(answers: list[Answer], wall_s: float) -> None:
    for is_good in (True, False):
        chosen = [answer for answer in answers if answer.is_good == is_good]
        latencies_s = [answer.latency_s for answer in chosen]
        p50, p99 = np.percentile(latencies_s, [50, 99])
        statuses = dict(sorted(Counter(answer.status for answer in chosen).items()))
        wrong = [answer.problem for answer in chosen if answer.problem]
        kind = "good" if is_good else "hostile"
        print(
            f"  {kind:8} {len(chosen):4}  p50 {p50:6.2f} s  p99 {p99:6.2f} s  statuses {statuses}  wrong {len(wrong)}"
        )
        for problem in wrong[:5]:
            print(f"    {problem}")
    good = sum(answer.is_good for answer in answers)
    models = dict(Counter(answer.model for answer in answers if answer.model))
    print(f"  {wall_s:.1f} s in all, {good / wall_s:.2f} clips per second; models {models}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="width of the images")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    limits = ServiceLimits(
        queue=options.requests + 10, requests_per_minute=10**6, upload_mb=UPLOAD_MB, request_s=600, upload_s=300
    )
    with tempfile.TemporaryDirectory() as model_folder, tempfile.TemporaryDirectory(prefix="g-") as folder:
        checkpoint = Path(shutil.copytree(packaged_path("models", MODELS[0]), f"{model_folder}/model"))
        arguments = {"token": TOKEN, "workers": options.workers, "limits": limits}
        with run_process(str(checkpoint), Path(folder), **arguments) as (address, process):
            send_good(address, 0, options.size, options.frames)
            memory = MemoryMonitor(process.pid)
            print(f"idle: {format_mb(memory.measure_mb())}")
            memory.start()
            for number in range(options.rounds):
                begin_s = time.monotonic()
                print(f"round {number + 1}: {options.requests} requests at once")
                answers = run_round(address, number, options, checkpoint)
                print_answers(answers, time.monotonic() - begin_s)
                time.sleep(2 * SAMPLE_S)
                print(f"  peak memory: {format_mb(memory.take())}; after it: {format_mb(memory.measure_mb())}")
            memory.stop()


def format_mb(totals: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {value:.0f}" for kind, value in sorted(totals.items()))
    return f"{parts}, in all {sum(totals.values()):.0f} MiB"


if __name__ == "__main__":
    main()
