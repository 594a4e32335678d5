"""When to stop before the last step: a STOP file, a signal, --max-hours.

DeepSpeed's launcher passes signals on to its ranks one after the other, 30 seconds apart, and some not at
all. So a request on any rank counts, and the loop agrees on it in a reduction it makes anyway.

    KSUB_REQUEUE=1    --max-hours ends with code 75, not 0, which asks the scheduler to start the run again
"""

import contextlib
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

from ksub_ds.common import distributed
from ksub_ds.common.exit_codes import DONE, REQUEUE, exit_code_of_signal

REQUEUE_WORD = "requeue"  # in the STOP file: a scheduler asks, and will start the run again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Watches for a request to stop while the `with` block runs; a second equal signal ends the process.

    Args:
        stop_file: RUN/STOP.
        max_hours: stop after so many hours; None for no limit.
    """

    def __init__(self, stop_file: Path, max_hours: float | None):
        self._stop_file = stop_file
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._out_of_time = False
        self._before: dict[int, object] = {}
        self.signal_number: int | None = None

    def reason(self) -> str | None:
        """Return why this rank wants to stop, or None. Only rank 0 looks at the file and the clock."""
        if self.signal_number is not None:
            return f"{signal.Signals(self.signal_number).name} received"
        if distributed.is_main():
            if self._stop_file.exists():
                return f"{self._stop_file} is there"
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._out_of_time = True
                return f"--max-hours {self._max_hours:g} is over"
        return None

    def exit_code(self) -> int:
        """Return the exit code that belongs to `reason`, as this rank sees it; 0 for a person's STOP or --max-hours."""
        if self.signal_number is not None:
            return REQUEUE if self.signal_number == signal.SIGUSR1 else exit_code_of_signal(self.signal_number)
        if distributed.is_main():
            with contextlib.suppress(OSError, UnicodeDecodeError):
                return REQUEUE if self._stop_file.read_text(encoding="utf-8").strip() == REQUEUE_WORD else DONE
            if self._out_of_time and os.environ.get("KSUB_REQUEUE") == "1":
                return REQUEUE
        return DONE

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, self._before[number])  # type: ignore[arg-type]  # as signal.signal returned it

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
