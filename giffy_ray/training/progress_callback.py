"""What a training reports after each epoch, brought to the process that waits for it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Listener
from typing import Any

from ray.train import UserCallback

_PAUSE_S = 0.1  # after a failure, which may be one that lasts
_log = logging.getLogger(__name__)


class MetricsRelayCallback(UserCallback):
    """Sends rank 0's metrics of every report from Ray Train's controller to the process that called fit().

    The controller always runs on that process's node, so a Unix socket is enough; Ray's own way, forwarding what
    actors print, puts a prefix on every line and lets all other lines through as well.
    """

    def __init__(self, address: str):
        self.address, self._fails = address, False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A report that cannot be sent is logged: Ray Train would end the training for what a callback raises."""
        try:
            _send(self.address, metrics[0])
        except OSError as failure:
            if not self._fails:
                _log.warning("%s: a report could not be sent (%r)", self.address, failure)
            self._fails = True
        else:
            self._fails = False


def _send(address: str, metrics: Mapping[str, Any] | None) -> None:
    with Client(address, family="AF_UNIX") as connection:
        connection.send(metrics)


@contextmanager
def relay_metrics(show: Callable[[Mapping[str, Any]], None]) -> Iterator[MetricsRelayCallback]:
    """A callback for ray.train.RunConfig; `show` is called here, in a thread, with each report's metrics.

    What `show` raises is logged and ends nothing: the controller waits until a report was taken, with the training.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        listener, ended = Listener(f"{folder}/reports", family="AF_UNIX"), threading.Event()
        address = str(listener.address)

        def receive() -> None:
            fails = False
            while not ended.is_set():
                try:
                    with listener.accept() as connection:
                        metrics = connection.recv()
                    if metrics is None:
                        return
                    show(metrics)
                    fails = False
                except Exception:  # nobody may read any more what is printed, as behind `| head`; a sender was killed
                    if not fails:
                        _log.exception("a report could not be shown")
                    fails = True
                    ended.wait(_PAUSE_S)

        thread = threading.Thread(target=receive, name="reports", daemon=True)
        thread.start()
        try:
            yield MetricsRelayCallback(address)
        finally:
            try:
                _send(address, None)  # after the last report
                thread.join()
            except OSError as failure:  # such as of a socket that a cleaner of temporary folders has removed
                _log.warning("%s: cannot be reached (%r)", address, failure)
            ended.set()
            with suppress(FileNotFoundError):
                listener.close()


def format_epoch(metrics: Mapping[str, Any], epochs: int) -> str:
    """One line of a report: `epoch  3/12  train/loss 61234  val/l2_paper 143.2  ...`."""
    shown = ("train/loss", "val/l2_paper", "val/psnr", "speed/clips_per_s")
    values = "  ".join(f"{name} {_short(metrics[name])}" for name in shown if name in metrics)
    return f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  {values}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
