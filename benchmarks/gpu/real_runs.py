"""The real program on packed shards: what its steps cost, and what it learns in the minutes that are left.

Each run is a process of `python -m ksub_ds.pretrain`, as a user starts it, with its loop, feed, engine and logs; its
numbers are those of its own metrics.jsonl. Its small files stay in OUT/runs, its checkpoints do not.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from trip import ROOT, Row, Trip, Variants

from ksub_ds.common.logging import read_lines

KEPT = ("metrics.jsonl", "evaluation.jsonl", "recipe.json", "train.log")
ENGINES = {
    "zero1, micro-batch 256": ("--deepspeed", "zero1", "--micro-batch-size", "256"),
    "zero0, micro-batch 256": ("--deepspeed", "zero0", "--micro-batch-size", "256"),
    "zero1, micro-batch 64": ("--deepspeed", "zero1", "--micro-batch-size", "64"),
}
REHEARSED_ENGINES = {name: (*options[:3], "2") for name, options in list(ENGINES.items())[:2]}
CODES = {"clustered": "clustered.safetensors", "positional": "positional.safetensors", "plain": None}
START_SECONDS = 45  # of a process, before its clock: imports, data; and the last checkpoint
COMPILE_SECONDS = 45  # on its clock: the first graph and kernels, kept on disk for the runs after it
LEAST_SECONDS = 10


def engine_variants(trip: Trip) -> Variants:
    """Return whole optimizer steps of the engine: tokens per second, wait for data, MFU."""
    steps = 4 if trip.rehearsal else 40
    for name, options in (REHEARSED_ENGINES if trip.rehearsal else ENGINES).items():
        more = ("--max-steps", str(steps), "--eval-every", "0", "--dropout", "0", *options)
        yield f"clustered, {name}", partial(train, trip, f"engine {name}", "clustered", more)


def training_variants(trip: Trip) -> Variants:
    """Return runs of equal length in seconds; the rate stays at its peak, as none knows how many steps it will make.

    Raises:
        RuntimeError: there is no time for three.
    """
    least = len(CODES) * (START_SECONDS + COMPILE_SECONDS + LEAST_SECONDS)
    if trip.seconds_left() < least:
        raise RuntimeError(f"{least} s are needed, {trip.seconds_left():.0f} are left: --only run, by itself")
    seconds = (
        LEAST_SECONDS
        if trip.rehearsal
        else max(LEAST_SECONDS, trip.seconds_left() / len(CODES) - START_SECONDS - COMPILE_SECONDS)
    )
    steps, every = ("6", "3") if trip.rehearsal else ("100000", "50")
    on_clock = seconds if trip.rehearsal else seconds + COMPILE_SECONDS
    more = ("--max-steps", steps, "--max-hours", f"{on_clock / 3600:.5f}", "--eval-every", every)
    more += ("--schedule", "wsd", "--decay-steps", "0", "--warmup-steps", "2" if trip.rehearsal else "100")
    more += ("--peak-lr", "5e-4", "--decoder-bias", "frequency", "--dropout", "0", "--save-every-steps", "1000000")
    more += ("--micro-batch-size", "2", "--eval-sequences", "1") if trip.rehearsal else ("--micro-batch-size", "256")
    for codes in CODES:
        yield f"{codes}, {seconds:.0f} s", partial(train, trip, f"run {codes}", codes, more)


def train(trip: Trip, name: str, codes: str, options: tuple[str, ...]) -> Row:
    """Run the training, and return the medians of its later steps and its evaluations.

    Of one that failed, or was stopped for its time, what it had; "error" is then the last line that it printed.

    Raises:
        RuntimeError: there is no --data.
    """
    if trip.data is None:
        raise RuntimeError("needs --data, a folder with shards/ and codes/")
    file = CODES[codes]
    which = ["--plain"] if file is None else ["--codes", str(trip.data / "codes" / file)]
    kept = trip.out / "runs" / name.replace(", ", " ").replace(" ", "_")
    kept.mkdir(parents=True, exist_ok=True)
    for each in KEPT:  # of an earlier try
        (kept / each).unlink(missing_ok=True)
    batch = ("--global-batch-size", "4") if trip.rehearsal else ()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "ksub_ds.pretrain", "--preset", trip.preset, *which, *batch, *options]
        command += ["--data", str(trip.data / "shards"), "--out", str(run)]
        start = time.perf_counter()
        try:
            with open(kept / "output.txt", "w") as output:
                limit = min(max(60.0, trip.seconds_left() + 60), 3600.0)
                done = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment(trip), timeout=limit
                )
        except subprocess.TimeoutExpired as error:
            failed = f"stopped after {error.timeout:.0f} s"
        else:
            last = " ".join((kept / "output.txt").read_text().split("\n")[-2:]).strip()
            failed = f"exit code {done.returncode}: {last}".rstrip() if done.returncode else ""
        seconds = time.perf_counter() - start
        for each in KEPT:
            if (run / each).exists():
                shutil.copy(run / each, kept)
    measured = outcome(kept) if read_lines(kept / "metrics.jsonl") else {}
    return measured | {"process_seconds": round(seconds, 1)} | ({"error": failed} if failed else {})


def environment(trip: Trip) -> dict[str, str]:
    """Return this process's, without the ranks of an outer launcher, the sources of this tree first."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if trip.device == "cpu" else {}
    return clean | {"PYTHONPATH": path} | offline | on_cpu


def outcome(run: Path) -> Row:
    """Summarise a run folder: every number of metrics.jsonl as the median of its later half, and its evaluations.

    Times begin after the first step, which warms up.
    """
    steps = read_lines(run / "metrics.jsonl")
    later = steps[len(steps) // 2 :]
    numbers = [key for key, value in later[-1].items() if isinstance(value, int | float) and key != "eta_seconds"]
    row: Row = {key: median(line[key] for line in later if key in line) for key in numbers}
    clock = [0.0, 0.0, *itertools.accumulate(line["step_seconds"] for line in steps[1:])]  # by step, after the first
    row["step"], row["trained_seconds"] = steps[-1]["step"], round(clock[-1], 1)
    row["data_wait_share"] = round(
        sum(line.get("data_wait_seconds", 0.0) for line in later) / sum(line["step_seconds"] for line in later), 4
    )
    scores = read_lines(run / "evaluation.jsonl") if (run / "evaluation.jsonl").exists() else []
    if scores:
        row["held_out"] = [[line["step"], round(clock[line["step"]], 1), line["loss"]] for line in scores]
        row["held_out_by_language"] = {key: value["loss"] for key, value in scores[-1]["languages"].items()}
    return row


def at_equal_time(rows: dict[str, Row]) -> dict[str, float]:
    """Return the held-out loss of each run at the training time that all of them reached.

    Their clocks begin after the first step and leave out evaluations, so that neither compiling nor the price of an
    evaluation counts. Between two evaluations it is interpolated.
    """
    curves = {name: row["held_out"] for name, row in rows.items() if len(row.get("held_out", ())) > 1}
    if len(curves) < 2:
        return {}
    common = min(curve[-1][1] for curve in curves.values())
    at = {name: float(np.interp(common, *np.transpose(each)[1:])) for name, each in curves.items()}
    return {"seconds": common} | {name: round(loss, 4) for name, loss in at.items()}
