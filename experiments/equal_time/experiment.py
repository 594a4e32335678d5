"""Trainings of equal processor time: what a step costs, which learning rate is best, runs from budget to budget.

One small network over the whole vocabulary of the shards' tokenizer, with several embeddings. The price of a step is
measured for every embedding first, in processor seconds of one thread (calibration.py); a time budget then gives each
embedding its number of steps.

Every training is a run of `ksub pretrain`, with warm-up, a steady rate, and a decay to zero over the last 15 % of its
steps. One run folder per embedding, rate and seed is extended from budget to budget: what it has at the end of a budget
is bit for bit what a run planned with that length would have, and all of them share the steady part. The learning rate
is chosen by shorter runs: of the given rates, and more while the best lies at the edge.

Each run is a folder, and finished parts are not repeated: the same command continues where it was stopped.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.equal_time.points import NUM_TABLES, Point
from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger, read_lines
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

HERE = Path(__file__).resolve().parent
KSUB = ("-m", "ksub_ds.cli")
DECAY_SHARE = 0.15
# One thread. The plain head writes matrices of 150 MB in every step; glibc would return them to the system each time,
# and pay a fifth of the step for getting them again.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
# What all runs of a folder share.
SETTINGS = ("preset", "width", "layers", "rows", "warmup_steps", "eval_sequences")


def option_parser(description: str, preset: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all these experiments have.

    Args:
        description: of the command.
        preset: of `ksub pretrain`, whose network is trained, in another size.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="shards of preprocessing/shard_text.py")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--seconds", type=float, nargs="+", help="the budgets, in processor seconds")
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates to begin with")
    add("--most-rates", type=int, default=5, help="learning rates of a kind, at most")
    add("--seeds", type=int, help="runs of what carries a claim")
    add("--parallel", type=int, default=1, help="runs at a time, of one thread each")
    add("--width", type=int, default=192, help="d")
    add("--layers", type=int, default=4)
    add("--rows", type=int, default=8, help="of the shards, in a step")
    add("--warmup-steps", type=int, default=40)
    add("--eval-sequences", type=int, default=24, help="held-out rows of each language")
    add("--rounds", type=int, default=11, help="steps whose median is the price")
    parser.set_defaults(preset=preset)
    return parser


@dataclass(frozen=True)
class Training:
    """One run folder.

    Attributes:
        point: the embedding.
        rate: the highest learning rate.
        seed: of weights, rows and masks.
        tlm_share: part of the rows that are pairs of a text and its translation.
    """

    point: Point
    rate: float
    seed: int
    tlm_share: float = 0.0

    @property
    def name(self) -> str:
        """Name the folder."""
        pairs = f"-tlm{self.tlm_share:g}" if self.tlm_share else ""
        return f"{self.point.name}{pairs}-lr{self.rate:g}-seed{self.seed}"


class Commands:
    """Python commands that run once each, over the files of a folder, and the processor seconds they took.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def keep_settings(self, options: argparse.Namespace, keys: Sequence[str]) -> None:
        """Write the settings that all commands of the folder share, or compare them with those of an earlier start.

        Raises:
            UserError: they differ.
        """
        self.settings = {key: getattr(options, key) for key in keys}
        path = self.out / "settings.json"
        before = read_json(path) if path.exists() else self.settings
        for key, value in self.settings.items():
            if before.get(key, value) != value:
                raise UserError(f"--{key.replace('_', '-')} {value}: {path} has {before[key]}; give another --out")
        write_json(path, self.settings)

    def command(self, made: Path, *words: Any) -> None:
        """Run a Python command unless `made` is there, and note its processor seconds.

        Raises:
            UserError: it failed.
        """
        if not made.exists():
            self._run(str(made.relative_to(self.out)), *words)

    def _run(self, name: str, *words: Any) -> None:
        line = [sys.executable, *map(str, words)]
        get_logger().info(f"+ {shlex.join(line)}")
        process = subprocess.Popen(line, env=os.environ | ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            path = self.out / "processor_seconds.json"
            seconds = read_json(path) if path.exists() else {}
            seconds[name] = round(seconds.get(name, 0.0) + usage.ru_utime + usage.ru_stime, 1)
            write_json(path, seconds)
        if process.returncode:
            raise UserError(f"{name}: failed with exit code {process.returncode}; its message is above")

    def processor_hours(self) -> float:
        """Return what all commands so far have taken."""
        return round(sum(read_json(self.out / "processor_seconds.json").values()) / 3600, 2)


class Experiment(Commands):
    """The commands of an experiment, each run once, over the files in OUT.

    Args:
        options: of the command line.
        more_settings: names of options, beside SETTINGS, that must stay as they were.
    """

    def __init__(self, options: argparse.Namespace, more_settings: Sequence[str] = ()):
        super().__init__(options.out)
        self.options = options
        self.material, self.runs = self.out / "material", self.out / "runs"
        self.material.mkdir(parents=True, exist_ok=True)
        dataset = ShardDataset.open(options.data, verify=False)
        self.num_tokens = load_tokenizer(dataset.tokenizer_folder).vocab_size
        self.searches: dict[str, Any] = {}
        self.keep_settings(options, (*SETTINGS, *more_settings))

    # ---- codes, fresh models, prices ----

    def codes(self, point: Point) -> Path | None:
        """Make the code file of a point; None for plain."""
        path = self.material / f"{point.name}.safetensors"
        if point.kind == "plain":
            return None
        source: tuple[Any, ...]
        sizes: tuple[Any, ...] = ("--num-tables", NUM_TABLES, "--table-size", point.table_size)
        if point.kind == "dedicated":
            shared = self.codes(Point("clustered", point.table_size))
            source, sizes = ("dedicate", shared, "--rows", point.dedicated_rows), ("--data", self.options.data)
        elif point.kind == "clustered":
            source = ("cluster", "--embeddings", self.options.data, "--workers", 1)
        else:
            source = ("positional", "--num-tokens", self.num_tokens)
        self.command(path, *KSUB, "codes", *source, *sizes, "--out", path)
        return path

    def embedding_parameters(self, point: Point) -> int:
        """Return the parameters of a point's embedding."""
        codes = self.codes(point)
        table = CodeTable.load(codes) if codes else plain_codes(self.num_tokens)
        return table.num_parameters(self.options.width)

    def fresh(self, point: Point, seed: int) -> Path:
        """Make the model that the runs of a point and seed start from."""
        codes, folder = self.codes(point), self.out / "fresh" / f"seed{seed}" / point.name
        words = ("--codes", codes) if codes else ()
        options = self.options
        network = ("--preset", options.preset, "--width", options.width, "--layers", options.layers, "--seed", seed)
        self.command(folder, HERE / "fresh.py", *words, "--data", options.data, *network, "--out", folder)
        return folder

    def prices(self, points: list[Point]) -> dict[str, float]:
        """Return the processor seconds of a step of each point; plain's are those of the cheapest way to compute it.

        All are measured in turns. A point that comes later is measured in turns with the first one, and its number
        scaled by what that one costs now: the machine may have become slower.
        """
        path = self.out / "prices.json"
        known: dict[str, float] = read_json(path) if path.exists() else {}
        new = [point for point in points if point.name not in known]
        if new:
            reference = [point for point in points if point.name in known][:1]
            number = len(list(self.out.glob("calibration-*.json")))
            measured = self.out / f"calibration-{number}.json"
            models = [self.fresh(point, 0) for point in reference + new]
            source = ("--models", *models, "--data", self.options.data, "--rows", self.options.rows)
            self.command(measured, HERE / "calibration.py", *source, "--rounds", self.options.rounds, "--out", measured)
            found = read_json(measured)
            medians = {
                point.name: min(each["median"] for way, each in found.items() if way.split(",")[0] == point.name)
                for point in reference + new
            }
            scale = known[reference[0].name] / medians[reference[0].name] if reference else 1.0
            known |= {point.name: round(scale * medians[point.name], 4) for point in new}
            write_json(path, known)
        return {point.name: known[point.name] for point in points}

    def calibrations(self) -> list[dict[str, Any]]:
        """Return all measurements of prices."""
        return [read_json(path) for path in sorted(self.out.glob("calibration-*.json"))]

    # ---- training ----

    def train(self, training: Training, steps: int, eval_sequences: int) -> dict[str, Any]:
        """Train a run to its end at `steps`, by extension of what is there; return the evaluation at that end.

        Raises:
            UserError: the run was planned beyond that end, or its training failed.
        """
        folder, options = self.runs / training.name, self.options
        if (found := self.evaluation(training, steps)) is not None:
            return found
        model, recipe = self.fresh(training.point, training.seed), folder / "recipe.json"
        planned = read_json(recipe)["max_steps"] if recipe.exists() else 0
        if planned > steps:
            raise UserError(
                f"{folder}: goes to {planned} steps already, of other budgets, and cannot end at {steps}; give "
                "--seconds as it was, or remove the folder"
            )
        extend = ("--extend",) if recipe.exists() else ()
        plan = ("--max-steps", steps, "--decay-steps", decay_steps(steps), "--eval-every", steps)
        pairs = ("--tlm-share", training.tlm_share) if training.tlm_share else ()
        self._run(
            f"{training.name} to step {steps}",
            *("-m", "ksub_ds.pretrain", "--preset", options.preset, "--warm-start", model),
            *("--data", options.data, "--out", folder, "--schedule", "wsd", *plan, *extend),
            *("--warmup-steps", options.warmup_steps, "--peak-lr", training.rate, "--seed", training.seed, *pairs),
            *("--global-batch-size", options.rows, "--dropout", 0, "--gradient-clipping", 1),
            *("--attention", "sdpa", "--deepspeed", "zero0", "--save-every-steps", 10**9, "--keep-last", 2),
            *("--eval-sequences", eval_sequences),
        )
        evaluation = self.evaluation(training, steps)
        if evaluation is None:
            raise UserError(f"{folder}: evaluation.jsonl has no line of step {steps}; remove the folder and run again")
        return evaluation

    def searched(self, point: Point, steps: int) -> dict[float, float]:
        """Return the losses of a point's runs that end at `steps`, of seed 0, by learning rate."""
        folders = self.runs.glob(f"{point.name}-lr*-seed0")
        rates = [float(folder.name.removeprefix(f"{point.name}-lr").removesuffix("-seed0")) for folder in folders]
        found = {rate: self.evaluation(Training(point, rate, 0), steps) for rate in rates}
        return {rate: scores["loss"] for rate, scores in found.items() if scores}

    def evaluation(self, training: Training, steps: int) -> dict[str, Any] | None:
        """Return the held-out scores of a run that ended at `steps`, or None."""
        folder = self.runs / training.name
        for path in (folder, folder / "ends" / f"step{steps}"):
            recipe = path / "recipe.json"
            if recipe.exists() and read_json(recipe)["max_steps"] == steps:
                lines = [line for line in read_lines(path / "evaluation.jsonl") if line["step"] == steps]
                if lines:
                    return lines[-1]
        return None

    def ends(self, training: Training, steps: Sequence[int]) -> list[dict[str, Any]]:
        """Return the scores of a run at those of `steps` that it has ended at."""
        found = {each: self.evaluation(training, each) for each in sorted(set(steps))}
        return [
            {"seed": training.seed, "steps": each} | {key: value for key, value in scores.items() if key != "step"}
            for each, scores in found.items()
            if scores is not None
        ]

    def train_part(self, training: Training, ends: Sequence[int], outcome: Callable[[], None]) -> None:
        """Train a run to each of its ends, and write the outcome."""
        for steps in ends:
            self.train(training, steps, self.options.eval_sequences)
        with self.lock:
            outcome()

    def tune(self, point: Point, steps: int, eval_sequences: int, on_the_way: Sequence[int] = ()) -> float:
        """Return the best learning rate of a point, in short runs: of the given rates, and more at the edge.

        Args:
            point: what is trained; rates that an earlier start tried count too.
            steps: of a run.
            eval_sequences: held-out rows of each language.
            on_the_way: ends before, which a longer run could not go back to.
        """
        losses = self.searched(point, steps)

        def further() -> list[float]:
            return beyond(losses) if len(losses) < self.options.most_rates else []

        rates = sorted(set(self.options.rates) - set(losses)) or further()
        while rates:
            for rate in rates:
                training = Training(point, rate, 0)
                for each in on_the_way:
                    self.train(training, each, self.options.eval_sequences)
                losses[rate] = self.train(training, steps, eval_sequences)["loss"]
            rates = further()
        best = min(losses, key=losses.__getitem__)
        found = {f"{rate:g}": loss for rate, loss in sorted(losses.items())}
        self.searches[point.kind] = {"steps": steps, "losses": found}
        get_logger().info(f"{point.kind}: learning rate {best:g} of {found}")
        return best


def decay_steps(steps: int) -> int:
    """Return the steps of a run's end in which the rate comes down: at least one, or the end would not be kept."""
    return max(1, round(DECAY_SHARE * steps))


def steps_in(seconds: float, price: float) -> int:
    """Return how many steps a budget buys."""
    return max(2, round(seconds / price))


def beyond(losses: dict[float, float]) -> list[float]:
    """Return the rate to try next where the best of several lies at the edge."""
    best = min(losses, key=losses.__getitem__)
    return [{min(losses): best / 2, max(losses): 2 * best}[best]] if best in (min(losses), max(losses)) else []


@contextlib.contextmanager
def pool_of(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool that starts nothing more once something has failed or was interrupted."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
