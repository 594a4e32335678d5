"""Ctrl-C outside the training loop is one line and exit code 130."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .runs import environment


def interrupt_in_reading(fifo: Path, module: str, *arguments: Any) -> tuple[int, str]:
    """Run a command that hangs in reading `fifo`, and interrupt it there. Returns exit code and stderr."""
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    writer, deadline = None, time.monotonic() + 60
    while writer is None and process.poll() is None and time.monotonic() < deadline:
        try:
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO  # nobody reads yet
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    if writer is not None:
        os.close(writer)
    return process.returncode, errors


@pytest.mark.parametrize("name", ["export", "pretrain"])
def test_ctrl_c_is_one_line(tmp_path: Path, tiny_shards: Path, name: str) -> None:
    run = tmp_path / "run"
    if name == "export":
        fifo = run / "checkpoints" / "global_step1" / "manifest.json"
        run.mkdir()
        (run / "recipe.json").write_text("{}")
        code, errors = interrupt_in_reading(fifo, "ksub_ds.cli", "export", run, "--out", tmp_path / "model")
    else:
        options = ("--preset", "tiny", "--plain", "--data", tiny_shards, "--out", run)
        code, errors = interrupt_in_reading(run / "recipe.json", "ksub_ds.pretrain", *options)
    resumes = "; run the same command again to resume" if name == "pretrain" else ""
    assert (code, errors.splitlines()[-1]) == (130, f"interrupted{resumes}")
    assert "Traceback" not in errors
