"""What a training reports reaches whoever waits for it, whatever becomes of the terminal."""

from concurrent.futures import ThreadPoolExecutor

from giffy_ray.reports import line_of, relayed


def test_a_report_that_cannot_be_shown_keeps_nobody_waiting(caplog):
    shown = []

    def show(metrics) -> None:
        shown.append(metrics["epoch"])
        if metrics["epoch"] == 1:
            raise BrokenPipeError("nobody reads")

    with relayed(show) as relay, ThreadPoolExecutor(1) as controller:
        for epoch in (1, 2, 3):
            report = [{"epoch": epoch}, {"epoch": -epoch}]  # of two workers, the first of which is rank 0
            controller.submit(relay.after_report, None, report, None).result(timeout=20)
    assert shown == [1, 2, 3]
    assert "nobody reads" in caplog.text


def test_a_line_says_what_was_measured():
    metrics = {"epoch": 3, "train/loss": 61234.4, "val/psnr": 20.126, "speed/step_ms": 5.0}
    assert line_of(metrics, 12) == "epoch  3/12  train/loss 61,234  val/psnr 20.13"
