"""metrics.jsonl keeps every step once; log lines go to stderr; progress tells rate and ETA."""

import contextlib
import io
import json

import pytest

from ksub_ds.common import logging as ksub_logging
from ksub_ds.common.logging import MetricsWriter, Progress, format_seconds, get_logger, read_lines


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_goes_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 8):
        writer.write(step=step, loss=1 / 3)
    writer.close()
    path.write_text(path.read_text() + '{"step": 8, "lo')  # what a kill leaves
    writer = MetricsWriter(path, resume_step=5)
    writer.write(step=6, loss=0.5)
    writer.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert json.loads(path.read_text().splitlines()[0])["loss"] == 1 / 3


def test_a_fresh_start_keeps_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsWriter(path).close()
    assert path.read_text() == ""


def test_a_line_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_lines_go_to_what_stderr_is_now():
    get_logger().info("before")
    with contextlib.redirect_stderr(io.StringIO()) as replaced:
        get_logger().info("within")
    assert replaced.getvalue().endswith(" within\n")


def test_progress_tells_rate_and_eta(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ksub_logging.time, "monotonic", lambda: clock[0])
    progress = Progress(400, "steps", "training", done=100)
    clock[0] += 10
    progress.advance(100)
    assert progress.line(loss=2.5) == "training: 200/400 steps, 10.0/s, ETA 0:00:20  loss 2.5"
    clock[0] += 990
    assert "0.1/s" in progress.line()
    assert Progress(None, "files", "reading").line().startswith("reading: 0 files, 0/s")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (90061, "25:01:01")])
def test_seconds_as_text(seconds, text):
    assert format_seconds(seconds) == text
