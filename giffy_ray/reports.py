"""What a training reports after each epoch, brought to the process that waits for it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from typing import Any

from ray.train import UserCallback

_log = logging.getLogger(__name__)


class Relay(UserCallback):
    """Sends rank 0's metrics of every report from Ray Train's controller to the process that called fit().

    The controller always runs on that process's node, so a Unix socket is enough; Ray's own way, forwarding what
    actors print, puts a prefix on every line and lets all other lines through as well.
    """

    def __init__(self, address: str):
        self.address = address

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with Client(self.address, family="AF_UNIX") as connection:
            connection.send(metrics[0])


@contextmanager
def relayed(show: Callable[[Mapping[str, Any]], None]) -> Iterator[Relay]:
    """A callback for ray.train.RunConfig; `show` is called here, in a thread, with each report's metrics.

    What `show` raises is logged and ends nothing: the controller waits until a report was taken, with the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        listener = Listener(f"{folder}/reports", family="AF_UNIX")

        def receive() -> None:
            while True:
                with listener.accept() as connection:
                    metrics = connection.recv()
                if metrics is None:
                    return
                try:
                    show(metrics)
                except Exception:  # nobody may read any more what is printed, as behind `| head`
                    _log.exception("a report could not be shown")

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        try:
            yield Relay(listener.address)  # type: ignore[arg-type]
        finally:
            with Client(listener.address, family="AF_UNIX") as connection:
                connection.send(None)
            thread.join()
            listener.close()


def line_of(metrics: Mapping[str, Any], epochs: int) -> str:
    """One line of a report: `epoch  3/12  train/loss 61234  val/l2_report 143.2  ...`."""
    shown = ("train/loss", "val/l2_report", "val/psnr", "speed/clips_per_s")
    values = "  ".join(f"{name} {_short(metrics[name])}" for name in shown if name in metrics)
    return f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  {values}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
