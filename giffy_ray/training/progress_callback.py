"""Relays the metrics that a training reports to the process that waits for it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from typing import Any

from ray.train import UserCallback

_RETRY_PAUSE_S = 0.1  # after a failure, which may persist
_log = logging.getLogger(__name__)


class MetricsRelayCallback(UserCallback):
    """Sends rank 0's metrics of every report from Ray Train's controller to the process that called fit().

    The controller always runs on that process's node, so a Unix socket is enough. Ray's alternative, forwarding the
    actors' stdout, prefixes every line and shows all other output too.
    """

    def __init__(self, address: str):
        self.address, self._failing = address, False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Logs a failure to send: Ray Train would end the training if a callback raised."""
        try:
            _send(self.address, metrics[0])
        except OSError as failure:
            if not self._failing:
                _log.warning("%s: cannot send metrics (%r)", self.address, failure)
            self._failing = True
        else:
            self._failing = False


def _send(address: str, metrics: Mapping[str, Any] | None) -> None:
    """Sends to the thread of `relay_metrics`. None ends it."""
    with Client(address, family="AF_UNIX") as connection:
        connection.send(metrics)


@contextmanager
def relay_metrics(show: Callable[[Mapping[str, Any]], None]) -> Iterator[MetricsRelayCallback]:
    """Yields a callback for `ray.train.RunConfig` that passes each report's metrics to `show` in this process.

    Args:
        show: Called in a thread. Its exceptions are logged and do not end the training, which waits until a report is
            received.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        listener = Listener(f"{folder}/reports", family="AF_UNIX")
        closed = threading.Event()
        address = str(listener.address)

        def receive() -> None:
            failing = False
            while not closed.is_set():
                try:
                    with listener.accept() as connection:
                        metrics = connection.recv()
                    if metrics is None:
                        return
                    show(metrics)
                    failing = False
                except Exception:  # the output was closed, as by `| head`; or the sender was killed
                    if not failing:
                        _log.exception("cannot show the metrics of a report")
                    failing = True
                    closed.wait(_RETRY_PAUSE_S)

        thread = threading.Thread(target=receive, name="reports", daemon=True)
        thread.start()
        try:
            yield MetricsRelayCallback(address)
        finally:
            try:
                _send(address, None)  # after the last report
                thread.join()
            except OSError as failure:  # for example, a cleaner of temporary folders removed the socket
                _log.warning("%s: cannot reach the thread that shows metrics (%r)", address, failure)
            closed.set()
            with suppress(FileNotFoundError):
                listener.close()


def format_epoch(metrics: Mapping[str, Any], epochs: int) -> str:
    """Formats a report as one line: `epoch  3/12  train/loss 61,234  val/l2_paper 143.20  ...`."""
    names = ("train/loss", "val/l2_paper", "val/psnr", "speed/clips_per_s")
    values = "  ".join(f"{name} {_format_value(metrics[name])}" for name in names if name in metrics)
    return f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  {values}"


def _format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
