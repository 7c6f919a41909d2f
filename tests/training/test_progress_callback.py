"""Reported metrics reach the waiting process, whatever happens to its terminal."""

import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client

import pytest

from giffy_ray.training.progress_callback import format_epoch, relay_metrics


def test_report_that_cannot_be_shown_does_not_block_the_controller(caplog):
    shown = []

    def show(metrics) -> None:
        shown.append(metrics["epoch"])
        if metrics["epoch"] == 1:
            raise BrokenPipeError("nobody reads")

    with relay_metrics(show) as relay, ThreadPoolExecutor(1) as controller:
        for epoch in (1, 2, 3):
            report = [{"epoch": epoch}, {"epoch": -epoch}]  # of two workers, rank 0 first
            controller.submit(relay.after_report, None, report, None).result(timeout=20)
    assert shown == [1, 2, 3]
    assert "nobody reads" in caplog.text


def test_reports_continue_after_a_sender_was_killed(caplog):
    shown = []
    with relay_metrics(lambda metrics: shown.append(metrics["epoch"])) as relay:
        Client(relay.address, family="AF_UNIX").close()
        for epoch in range(4):
            relay.after_report(None, [{"epoch": epoch}], None)
    assert shown == [0, 1, 2, 3]
    assert "EOFError" in caplog.text


def test_removed_socket_does_not_end_the_training(caplog):
    def train() -> None:
        with relay_metrics(print) as relay:
            os.remove(relay.address)
            for epoch in range(3):
                relay.after_report(None, [{"epoch": epoch}], None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert sum("cannot send metrics" in record.message for record in caplog.records) == 1


def test_format_epoch_shows_the_measured_values():
    metrics = {"epoch": 3, "train/loss": 61234.4, "val/psnr": 20.126, "speed/step_ms": 5.0}
    assert format_epoch(metrics, 12) == "epoch  3/12  train/loss 61,234  val/psnr 20.13"
