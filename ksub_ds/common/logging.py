"""What a run reports: log lines, metrics.jsonl, progress with a rate and an ETA."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ksub_ds.common.files import atomic_path

PLAIN_LINE_SECONDS = 10.0


class _StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to what sys.stderr is when a line comes: notebooks and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def get_logger() -> logging.Logger:
    """Return the project's logger: plain lines on stderr, set up once per process."""
    logger = logging.getLogger("ksub_ds")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def add_log_file(path: Path) -> None:
    """Also append every log line to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    get_logger().addHandler(handler)


def close_log_files() -> None:
    """Write no further line to the files of `add_log_file`: this process may go on with something else."""
    for handler in [each for each in get_logger().handlers if isinstance(each, logging.FileHandler)]:
        get_logger().removeHandler(handler)
        handler.close()


class MetricsWriter:
    """metrics.jsonl: one JSON object per line, each with its `step`.

    A resumed run goes back to its checkpoint, so lines beyond `resume_step` (and a last line cut
    short by a kill) are dropped first: afterwards every step is in the file exactly once.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        kept = [line for line in read_lines(path) if line["step"] <= resume_step] if resume_step else []
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def write(self, **values: Any) -> None:
        """Append one line and hand it to the operating system at once."""
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl or evaluation.jsonl without lines that a kill cut short; a missing file is empty."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # the line a kill cut short, or one that no run wrote
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Progress:
    """Progress of long work: a bar on a terminal, a plain line every ten seconds in a log.

    Args:
        total: number of units; None when unknown.
        unit: what is counted, for example "documents".
        description: what is being done.
        done: units already done before this start (a resumed run).
    """

    def __init__(self, total: int | None, unit: str, description: str, done: int = 0):
        self.total, self.unit, self.description = total, unit, description
        self.done = self._start_done = done
        self._start = self._last_line = time.monotonic()
        self._bar = _terminal_bar(self) if sys.stderr.isatty() else None

    def advance(self, count: int = 1, **info: Any) -> None:
        """Count `count` more units and show `info` (loss=..., files=...) beside them."""
        self.done += count
        if self._bar:
            self._bar[0].update(self._bar[1], completed=self.done, info=_pairs(info))
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            get_logger().info(self.line(**info))

    def line(self, **info: Any) -> str:
        """Return the state as one line of text."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._start_done) / seconds
        text = f"{self.description}: {self.done:,}"
        if self.total is not None:
            text += f"/{self.total:,}"
        text += f" {self.unit}, {rate:,.1f}/s" if rate >= 10 else f" {self.unit}, {rate:.2g}/s"
        if self.total is not None and rate > 0:
            text += f", ETA {format_seconds((self.total - self.done) / rate)}"
        return text + ("  " + _pairs(info) if info else "")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar[0].stop()
        if kind is None:
            get_logger().info(self.line())


def _pairs(info: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in info.items())


def _terminal_bar(progress: Progress) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(progress.unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    bar = RichProgress(*columns, console=Console(stderr=True))
    task = bar.add_task(progress.description, total=progress.total, completed=progress.done, info="")
    bar.start()
    return bar, task


def format_seconds(seconds: float) -> str:
    """Format seconds as H:MM:SS: 12345.6 -> '3:25:46'."""
    seconds = int(seconds + 0.5)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
