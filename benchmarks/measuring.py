"""How the benchmarks measure: ratios in one run, best of interleaved repeats, peak memory in a fresh process."""

import contextlib
import datetime
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

TURN_SECONDS = 0.5


def machine() -> dict[str, Any]:
    """Describe the machine and the day: processor, cores, versions, date."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time each function: the best call of `repeats` rounds in seconds; in every round each has a turn.

    `clock` may be `time.process_time` where one thread of a CPU does the work: on a shared machine it leaves out what
    others took.

    A turn lasts at least TURN_SECONDS: a call of milliseconds alone, after a long one of another
    variant, would only measure how that one left the caches.
    """
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            gc.collect()
            turn_ends = clock() + TURN_SECONDS
            while True:
                start = clock()
                function()
                now = clock()
                best[name] = min(best[name], now - start)
                if now >= turn_ends:
                    break
    return best


def peak_memory(function: Callable[[], object]) -> int:
    """Measure by how many bytes the resident set peaks above its size before the call. Use a fresh process."""
    gc.collect()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return max(0, _peak() - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


class PeakMemory(threading.Thread):
    """The most memory, in bytes, of this process and its workers together; what they share counts once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(3):  # the kernel takes its time to add up shared pages
            total = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # it ended meanwhile
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.join()


def in_fresh_process(script: str, *arguments: str, trims: bool = True) -> Any:
    """Run `python script arguments` and return the JSON on the last line of its output.

    With `trims` freed blocks go back to the system, or the peak of one call would hide in memory that an earlier one
    left. A command that is timed keeps them, as programs do: giving them back costs half of the time again where there
    are many large arrays.
    """
    environment = {"MALLOC_TRIM_THRESHOLD_": "65536"} | os.environ if trims else None
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n")
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def verdict(value: float, bound: float, at_least: bool = True) -> str:
    """Return 'ok' or 'MISSED' with the bound, for the last column of a table."""
    met = value >= bound if at_least else value <= bound
    return f"{'ok' if met else 'MISSED'} ({'>=' if at_least else '<='} {bound:g})"


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result as JSON when a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(machine() | result, indent=2) + "\n")
        print(f"\nwritten: {path}")
