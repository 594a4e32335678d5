"""The folder of a curve: one watcher at a time, one set of settings, a line a checkpoint."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import MetricsWriter, get_logger


class Curve:
    """OUT/curve.jsonl, locked as long as this is open (`with`), and OUT/watch.json, how it was scored.

    Raises:
        UserError: OUT cannot be written, or another watcher is at work there.
    """

    def __init__(self, out: Path):
        self._out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"--out {out}: another `ksub evaluate watch` is at work there") from error
        path = out / "curve.jsonl"
        self._writer = MetricsWriter(path, resume_step=2**62)  # drops a last line that a kill cut short
        self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def __enter__(self) -> "Curve":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def agree(self, settings: dict[str, Any]) -> None:
        """Keep how the points are scored; points scored otherwise, or of another run, could not be compared.

        Raises:
            UserError: naming the setting that was another.
        """
        path = self._out / "watch.json"
        before = read_json(path) if self.lines and path.exists() else settings
        for key, value in settings.items():
            if not isinstance(before, dict) or before.get(key) != value:
                old = before.get(key) if isinstance(before, dict) else before
                raise UserError(
                    f"--out {self._out}: holds a curve with other settings ({key}: {old} -> {value}); "
                    "give the old ones, or a new --out"
                )
        write_json(path, settings)

    @property
    def steps(self) -> set[int]:
        """The steps that are scored."""
        return {line["step"] for line in self.lines}

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; a kill cuts short no earlier one."""
        self._writer.write(**line)
        self.lines.append(line)
        get_logger().info(in_words(line))

    def table(self) -> str:
        """All lines, in words."""
        return "\n".join(in_words(line) for line in sorted(self.lines, key=lambda line: line["step"]))


def in_words(line: dict[str, Any]) -> str:
    """A point of the curve as one line of text."""
    text = f"step {line['step']:,}"
    if "masked_accuracy" in line:
        text += f": masked accuracy {100 * line['masked_accuracy']:.1f} %, held-out loss {line['loss']:.3f}"
    if "xnli" in line:
        text += f", XNLI average {100 * line['xnli']['average']:.1f} %"
    return text
