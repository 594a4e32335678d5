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

A variant that fails is one line with its error, and the next one goes on. OUT/results.json is written after each, so
that a trip cut short keeps what it had. No variant is begun after --seconds; a part may be repeated with --only.
"""

import gc
import importlib
import math
import os
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
WIDTH_OF_NAMES = 60


@dataclass
class Options:
    out: Path
    """Folder for results.json (of a rehearsal rehearsal.json) and the logs of the runs."""
    data: Path | None = None
    """Folder with shards/ and codes/, for the parts engine and run. [a rehearsal makes a small one]"""
    only: tuple[Literal["machine", "errors", "loss", "step", "engine", "profile", "run"], ...] = tuple(PARTS)
    """These parts only; what results.json has of the others stays."""
    seconds: float = 540
    """Begin no variant after this time; the part `run` fills what is left. A rehearsal has no limit."""
    rehearse: bool = False
    """Everything small and on a CPU, with Triton's interpreter."""


def main() -> int:
    """Return 1 if a variant failed."""
    options = tyro.cli(Options, description=__doc__)
    ends = math.inf if options.rehearse else time.monotonic() + options.seconds
    if options.rehearse:  # before Triton and DeepSpeed are imported
        os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from trip import Trip

    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no GPU here; --rehearse does everything small on a CPU")

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data
        if options.rehearse and data is None and {"engine", "run"} & set(options.only):
            from small_data import make

            data = make(Path(scratch))
        trip = Trip(options.out, options.rehearse, "cpu" if options.rehearse else "cuda", ends, data)
        results = measure(trip, [name for name in PARTS if name in options.only])
    print_table(results)
    failed = [f"{part}: {name}" for part, rows in results.items() for name, row in rows.items() if "error" in row]
    print(f"\n{sum(map(len, results.values()))} variants, {len(failed)} failed; results in {results_file(trip)}")
    return int(bool(failed))


def results_file(trip: Any) -> Path:
    """Return where results go: a rehearsal's are not measurements, and never among them."""
    return trip.out / ("rehearsal.json" if trip.rehearsal else "results.json")


def measure(trip: Any, parts: list[str]) -> dict[str, dict[str, Any]]:
    """Measure the parts one variant after the other; what an earlier command left of other parts stays."""
    path = results_file(trip)
    results: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise UserError(f"{path}: is not a file of this program; move it away")
    for part in parts:
        print(f"== {part}", flush=True)
        rows = results[part] = {}
        for name, row in rows_of(trip, part):
            rows[name] = row
            write_json(path, results)
            print(line(name, row), flush=True)
    return {part: results[part] for part in PARTS if part in results}


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
    except Exception as error:  # the part itself: a package is missing
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
