"""One trip to a GPU machine without a network: everything that is to be known, measured by one command.

    python benchmarks/gpu/run.py --out results --data DATA         on the machine; `pack.sh` makes what goes there
    python benchmarks/gpu/run.py --out results --rehearse          all of it, small, on a CPU

Parts, in this order:

    machine   its ceilings: matrix products, copying, launching; versions
    errors    loss and gradients against dense float64, all kinds of codes, every form of the loss
    loss      time and memory of the loss; then the dense decoder, cut-cross-entropy and liger-kernel
    step      forward and backward of XLM-R-MEDIUM over micro-batches, eager and compiled
    engine    `ksub pretrain` on packed shards: optimizer steps with its own loop, feed and logging
    profile   kernels by time, and where the host waits
    run       plain, positional and clustered codes for equal times; held-out loss per language

Each part is a process of its own, since an error of CUDA's takes a process's device for good, and has a time of its
own, since the first of a kernel may take a minute to compile. A variant that fails is one line with its error, and the
next one goes on. OUT/results.json is written after each, so that a trip cut short keeps what it had. No variant is
begun after --seconds; a part may be repeated with --only.
"""

import contextlib
import gc
import importlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import read_json, write_json

PARTS = {
    "machine": ("ceilings", "variants"),
    "errors": ("exactness", "variants"),
    "loss": ("loss_cost", "variants"),
    "step": ("step_cost", "variants"),
    "engine": ("real_runs", "engine_variants"),
    "profile": ("step_cost", "profile_variants"),
    "run": ("real_runs", "training_variants"),
}
# At most, of a whole trip; `run` takes what is left.
SECONDS = {"machine": 30, "errors": 110, "loss": 80, "step": 120, "engine": 160, "profile": 40}
LATE_SECONDS = 90  # in which a variant that was begun in time may end
WIDTH_OF_NAMES = 60


@dataclass
class Options:
    out: Path
    """Folder for results.json (of a rehearsal rehearsal.json) and the logs of the runs."""
    data: Path | None = None
    """Folder with shards/ and codes/, for the parts engine and run. [a rehearsal makes a small one]"""
    only: tuple[Literal["machine", "errors", "loss", "step", "engine", "profile", "run"], ...] = tuple(PARTS)
    """These parts only; what results.json has of the others stays."""
    seconds: float = 500
    """Begin no variant after this time; the part `run` fills what is left. A rehearsal has no limit."""
    rehearse: bool = False
    """Everything small and on a CPU, with Triton's interpreter."""
    in_this_process: bool = False
    """(internal) Measure the one part of --only here, and print no table."""


def main() -> int:
    """Return 1 if a variant failed."""
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    path = results_file(options.out, options.rehearse)
    if options.in_this_process:
        measure(trip_of(options), options.only[0], path)
        return 0
    parts = [name for name in PARTS if name in options.only]
    with tempfile.TemporaryDirectory() as scratch:
        if options.rehearse and options.data is None and {"engine", "run"} & set(parts):
            from small_data import make

            options.data = make(Path(scratch))
        trip_of(options)  # no GPU is told of once
        measure_in_processes(options, parts, path)
    results = read_results(path)
    print_table(results)
    failed = [f"{part}: {name}" for part, rows in results.items() for name, row in rows.items() if "error" in row]
    print(f"\n{sum(map(len, results.values()))} variants, {len(failed)} failed; results in {path}")
    return int(bool(failed))


def trip_of(options: Options) -> Any:
    """Return the Trip of some options.

    Raises:
        UserError: there is no GPU.
    """
    if options.rehearse:  # before Triton and DeepSpeed are imported
        os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from trip import Trip

    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no GPU here; --rehearse does everything small on a CPU")
    ends = math.inf if options.rehearse else time.monotonic() + options.seconds
    return Trip(options.out, options.rehearse, "cpu" if options.rehearse else "cuda", ends, options.data)


def measure_in_processes(options: Options, parts: list[str], path: Path) -> None:
    """Measure each part in a process, which is ended some time after its own, whatever it does."""
    ends = math.inf if options.rehearse else time.monotonic() + options.seconds
    for part in parts:
        seconds = min(ends - time.monotonic(), SECONDS.get(part, math.inf))
        if seconds <= 0:
            keep_row(path, part, part, {"skipped": "no time left"})
            continue
        command = [sys.executable, __file__, "--in-this-process", "--out", options.out, "--only", part]
        command += ["--rehearse"] if options.rehearse else ["--seconds", f"{seconds:.0f}"]
        command += ["--data", options.data] if options.data else []
        limit = None if options.rehearse else seconds + LATE_SECONDS
        if stopped := run_at_most([*map(str, command)], limit):
            keep_row(path, part, part, {"error": stopped})


def run_at_most(command: list[str], seconds: float | None) -> str:
    """Run a command, end it and its children after some time, and return how it failed; "" if it did not."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"ended with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results_file(out: Path, rehearsal: bool) -> Path:
    """Return where results go: a rehearsal's are not measurements, and never among them."""
    return out / ("rehearsal.json" if rehearsal else "results.json")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results so far, by part and variant.

    Raises:
        UserError: the file is none of this program's.
    """
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise UserError(f"{path}: is not a file of this program; move it away")
    return {part: results[part] for part in PARTS if part in results}


def keep_row(path: Path, part: str, name: str, row: dict[str, Any]) -> None:
    """Write a variant's result, and print it."""
    results = read_results(path)
    results.setdefault(part, {})[name] = row
    write_json(path, results)
    print(line(name, row), flush=True)


def measure(trip: Any, part: str, path: Path) -> None:
    """Measure a part, one variant after the other; what an earlier command left of other parts stays."""
    print(f"== {part}", flush=True)
    write_json(path, read_results(path) | {part: {}})
    for name, row in rows_of(trip, part):
        keep_row(path, part, name, row)
    if part == "run":
        from real_runs import at_equal_time

        if common := at_equal_time(read_results(path)[part]):
            keep_row(path, part, "at equal time", common)


def rows_of(trip: Any, part: str) -> Any:
    """Yield name and result of each variant of a part; a failure is a result."""
    import torch

    module, function = PARTS[part]
    try:
        for name, variant in getattr(importlib.import_module(module), function)(trip):
            if trip.seconds_left() <= 0:
                yield name, {"skipped": "no time left"}
                continue
            start = time.perf_counter()
            try:
                row = variant()
            except Exception as error:
                row = failure(error)
            yield name, row | {"seconds": round(time.perf_counter() - start, 2)}
            gc.collect()
            if trip.device == "cuda":
                torch.cuda.empty_cache()
    except Exception as error:  # the part itself: a package is missing, or the device is lost
        yield part, failure(error)


def failure(error: Exception) -> dict[str, str]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return {"error": f"{type(error).__name__}: {str(error)[:400]}", "at": f"{where.filename}:{where.lineno}"}


def line(name: str, row: dict[str, Any]) -> str:
    """Return a variant's result as one line: its numbers, not its lists."""
    shown = {key: value for key, value in row.items() if not isinstance(value, list | dict) and value is not None}
    numbers = "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    return f"   {name:<{WIDTH_OF_NAMES}} {numbers}"


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print what matters of each variant: one line each, failures too."""
    keys = (
        "tflops",
        "terabytes_per_second",
        "microseconds",
        "loss_error",
        "gradient_error",
        "ok",
        "ms",
        "extra_mb",
        "waits",
        "wall_ms",
        "busy_ms",
    )
    keys += ("tokens_per_second", "mfu", "data_wait_share", "step", "error", "skipped")
    for part, rows in results.items():
        print(f"\n{part}")
        for name, row in rows.items():
            shown = {key: row[key] for key in keys if row.get(key) is not None}
            if row.get("held_out"):
                shown["held_out_loss"] = row["held_out"][-1][-1]
            print(line(name, shown)[:170])


if __name__ == "__main__":
    sys.exit(run_main(main))
