"""The frontier: embedding parameters against held-out loss, at equal steps and at equal processor time.

    python experiments/frontier/run.py --data shards --out frontier-experiment

One small network (ModernBERT's, 4 layers of width 192) over the whole vocabulary of the shards' tokenizer, with a plain
embedding, positional and clustered codes, and clustered codes with rows of their own for the most frequent tokens
(dedicated rows). The price of a step is measured for every embedding first, in processor seconds of one thread
(calibration.py); a time budget then gives each embedding its number of steps.

Every training is a run of `ksub pretrain`, with warm-up, a steady rate, and a decay to zero over the last 15 % of its
steps. One run folder per embedding, rate and seed is extended from budget to budget: what it has at the end of a budget
is bit for bit what a run planned with that length would have, and all of them share the steady part. The learning
rate is chosen for each kind of embedding by shorter runs: of three rates, and more while the best lies at the edge.

Each run is a folder, and finished parts are not repeated: the same command continues where it was stopped. OUT has
results.json, table.md and frontier.png, rewritten after every part.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from outcome import write_outcome
from points import NUM_TABLES, Point, all_points

from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
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


@dataclass(frozen=True)
class Training:
    """One run folder."""

    point: Point
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name the folder."""
        return f"{self.point.name}-lr{self.rate:g}-seed{self.seed}"


class Experiment:
    """The commands of the experiment, each run once, over the files in OUT.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.material, self.runs = self.out / "material", self.out / "runs"
        self.material.mkdir(parents=True, exist_ok=True)
        dataset = ShardDataset.open(options.data, verify=False)
        self.num_tokens = load_tokenizer(dataset.tokenizer_folder).vocab_size
        self.points = all_points(self.num_tokens, options.table_sizes, options.dedicated_rows)
        self.lock = threading.Lock()
        self.searches: dict[str, Any] = {}
        self._settings()

    def _settings(self) -> None:
        """Write the settings that all runs share, or compare them with those of an earlier start.

        Raises:
            UserError: they differ.
        """
        keys = ("width", "layers", "rows", "warmup_steps", "eval_sequences", "table_sizes", "dedicated_rows")
        self.settings = {key: getattr(self.options, key) for key in keys}
        path = self.out / "settings.json"
        before = read_json(path) if path.exists() else self.settings
        for key, value in self.settings.items():
            if before[key] != value:
                raise UserError(f"--{key.replace('_', '-')} {value}: {path} has {before[key]}; give another --out")
        write_json(path, self.settings)

    # ---- commands ----

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

    # ---- codes, fresh models, prices ----

    def codes(self, point: Point) -> Path | None:
        """Make the code file of a point; None for plain."""
        path = self.material / f"{point.name}.safetensors"
        data = ("--data", self.options.data)
        if point.kind == "plain":
            return None
        if point.kind == "dedicated":
            shared = self.codes(Point("clustered", point.table_size))
            self.command(path, *KSUB, "codes", "dedicate", shared, "--rows", point.dedicated_rows, *data, "--out", path)
            return path
        sizes = ("--num-tables", NUM_TABLES, "--table-size", point.table_size, "--out", path)
        way = {
            "positional": ("positional", "--num-tokens", self.num_tokens),
            "clustered": ("cluster", "--embeddings", self.options.data, "--workers", 1),
        }
        self.command(path, *KSUB, "codes", *way[point.kind], *sizes)
        return path

    def fresh(self, point: Point, seed: int) -> Path:
        """Make the model that the runs of a point and seed start from."""
        codes, folder = self.codes(point), self.out / "fresh" / f"seed{seed}" / point.name
        words = ("--codes", codes) if codes else ()
        network = ("--width", self.options.width, "--layers", self.options.layers, "--seed", seed)
        self.command(folder, HERE / "fresh.py", *words, "--data", self.options.data, *network, "--out", folder)
        return folder

    def prices(self, points: list[Point]) -> dict[str, float]:
        """Return the processor seconds of a step of each point; plain's are those of the cheaper way to compute it.

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

    # ---- training ----

    def train(self, training: Training, steps: int, eval_sequences: int) -> dict[str, Any]:
        """Train a run to its end at `steps`, by extension of what is there; return the evaluation at that end."""
        folder = self.runs / training.name
        if (found := self.evaluation(training, steps)) is not None:
            return found
        model = self.fresh(training.point, training.seed)
        extend = ("--extend",) if (folder / "recipe.json").exists() else ()
        plan = ("--max-steps", steps, "--decay-steps", decay_steps(steps), "--eval-every", steps)
        self._run(
            f"{training.name} to step {steps}",
            *("-m", "ksub_ds.pretrain", "--preset", "small_modernbert", "--warm-start", model),
            *("--data", self.options.data, "--out", folder, "--schedule", "wsd", *plan, *extend),
            *("--warmup-steps", self.options.warmup_steps, "--peak-lr", training.rate, "--seed", training.seed),
            *("--global-batch-size", self.options.rows, "--dropout", 0, "--gradient-clipping", 1),
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


def decay_steps(steps: int) -> int:
    """Return the steps of a run's end in which the rate comes down: at least one, or the end would not be kept."""
    return max(1, round(DECAY_SHARE * steps))


def tune(experiment: Experiment, kind: str, price: float, equal: int) -> float:
    """Return the best learning rate of a kind of embedding, in short runs: of the given rates, and more at the edge.

    Args:
        experiment: gives the options; rates that an earlier start tried count too.
        kind: whose first point is trained.
        price: seconds a step of that point.
        equal: steps at which all are compared. A run cannot go back to them later, so a shorter search must not pass
            them by.
    """
    options = experiment.options
    point = next(each for each in experiment.points if each.kind == kind)
    steps = max(options.warmup_steps + 1, round(options.search_seconds / price))
    losses = experiment.searched(point, steps)
    rates = sorted(set(options.rates) - set(losses))
    while rates:
        for rate in rates:
            training = Training(point, rate, 0)
            if 0 < equal < steps:
                experiment.train(training, equal, options.eval_sequences)
            losses[rate] = experiment.train(training, steps, options.search_sequences)["loss"]
        rates = []
        if len(losses) < options.most_rates:
            rates = [rate for rate in beyond(losses) if rate not in losses]
    best = min(losses, key=losses.__getitem__)
    found = {f"{rate:g}": loss for rate, loss in sorted(losses.items())}
    experiment.searches[kind] = {"steps": steps, "losses": found}
    get_logger().info(f"{kind}: learning rate {best:g} of {found}")
    return best


def beyond(losses: dict[float, float]) -> list[float]:
    """Return the rate to try next where the best of several lies at the edge."""
    best = min(losses, key=losses.__getitem__)
    return [{min(losses): best / 2, max(losses): 2 * best}[best]] if best in (min(losses), max(losses)) else []


def stages(
    options: argparse.Namespace, points: list[Point], prices: dict[str, float], rates: dict[str, float]
) -> Iterator[dict[Training, list[int]]]:
    """List what is trained, in stages: for each run, the steps it is trained to in turn.

    The points that carry a claim, the first of their kinds, have all budgets and seeds, and an end at as many steps as
    plain makes in the longest budget; the others have the least budget and one seed, and that end where they reach it.
    """
    budgets = sorted(options.seconds)
    equal = equal_steps(prices, budgets)
    for seed in range(options.seeds):
        for number, budget in enumerate(budgets):
            stage = {}
            for point in claim_points(points) if seed or number else points:
                price = prices[point.name]
                steps, least = steps_in(budget, price), steps_in(budgets[number - 1], price) if number else 0
                ends = [each for each in sorted({equal, steps}) if least < each <= steps]
                stage[Training(point, rates[point.tuned_as], seed)] = ends
            yield stage


def claim_points(points: list[Point]) -> list[Point]:
    """Return the points that carry a claim: the first ones of plain, clustered and dedicated."""
    kinds = ("plain", "clustered", "dedicated")
    firsts = {point.kind: point for point in reversed(points)}
    return [firsts[kind] for kind in kinds if kind in firsts]


def steps_in(seconds: float, price: float) -> int:
    """Return how many steps a budget buys."""
    return max(2, round(seconds / price))


def equal_steps(prices: dict[str, float], budgets: list[float]) -> int:
    """Return the number of steps at which all are compared: plain's in the longest budget; 0 without plain."""
    return steps_in(max(budgets), prices["plain"]) if "plain" in prices else 0


def run(options: argparse.Namespace) -> None:
    """Run what is missing of the chosen points; write the outcome after every part."""
    experiment = Experiment(options)
    chosen = [point for point in experiment.points if not options.only or point.name in options.only]
    unknown = set(options.only or ()) - {point.name for point in chosen}
    if unknown:
        names = ", ".join(point.name for point in experiment.points)
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such point; there are {names}")
    prices = experiment.prices(chosen)
    kinds = list(dict.fromkeys(point.tuned_as for point in chosen))
    firsts = {kind: next(point for point in experiment.points if point.kind == kind) for kind in kinds}
    missing = [point for point in firsts.values() if point.name not in prices]
    if missing:
        raise UserError(f"--only: the learning rate is chosen on {missing[0].name}; name it too")
    with pool_of(options.parallel) as pool:
        equal = equal_steps(prices, options.seconds)
        best = pool.map(lambda kind: tune(experiment, kind, prices[firsts[kind].name], equal), kinds)
        rates = dict(zip(kinds, best, strict=True))
        outcome = partial(report, experiment, prices, rates)
        outcome()
        for stage in stages(experiment.options, chosen, prices, rates):
            done = [pool.submit(train_part, experiment, run, ends, outcome) for run, ends in stage.items()]
            for each in done:
                each.result()


def report(experiment: Experiment, prices: dict[str, float], rates: dict[str, float]) -> None:
    """Write the outcome of what has been trained, by whatever start with these budgets."""
    options, budgets = experiment.options, sorted(experiment.options.seconds)
    equal, width = equal_steps(prices, budgets), options.width
    points = []
    for point in experiment.points:
        if point.name not in prices:
            continue
        steps = [steps_in(budget, prices[point.name]) for budget in budgets]
        trainings = [Training(point, rates[point.tuned_as], seed) for seed in range(options.seeds)]
        ends = [
            {"seed": training.seed, "steps": each} | scores
            for training in trainings
            for each in sorted({equal, *steps})
            if (scores := experiment.evaluation(training, each)) is not None
        ]
        codes = experiment.codes(point)
        table = CodeTable.load(codes) if codes else plain_codes(experiment.num_tokens)
        points.append(
            {
                **dataclasses.asdict(point),
                "name": point.name,
                "embedding_parameters": table.num_parameters(width),
                "learning_rate": rates[point.tuned_as],
                "seconds_a_step": prices[point.name],
                "steps_of_budgets": steps,
                "ends": [{key: value for key, value in end.items() if key != "step"} for end in ends],
            }
        )
    seconds = read_json(experiment.out / "processor_seconds.json")
    results = {
        "settings": experiment.settings | {"num_tokens": experiment.num_tokens, "decay_share": DECAY_SHARE},
        "budgets_seconds": budgets,
        "equal_steps": equal,
        "plain_parameters": experiment.num_tokens * width,
        "points": points,
        "not_run": [point.name for point in experiment.points if point.name not in prices],
        "searches": experiment.searches,
        "calibrations": [read_json(path) for path in sorted(experiment.out.glob("calibration-*.json"))],
        "processor_hours": round(sum(seconds.values()) / 3600, 2),
    }
    print(write_outcome(experiment.out, results), flush=True)


@contextlib.contextmanager
def pool_of(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool that starts nothing more once something has failed or was interrupted."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train_part(experiment: Experiment, training: Training, ends: list[int], outcome: Callable[[], None]) -> None:
    """Train a run to each of its ends, and write the outcome."""
    for steps in ends:
        experiment.train(training, steps, experiment.options.eval_sequences)
    with experiment.lock:
        outcome()


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Embedding parameters against held-out loss at equal cost.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="shards of preprocessing/shard_text.py")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--seconds", type=float, nargs="+", default=[360, 1080], help="the budgets, in processor seconds")
    add("--search-seconds", type=float, default=120, help="of a run that chooses the learning rate")
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates to begin with")
    add("--most-rates", type=int, default=5, help="learning rates of a kind, at most")
    add("--table-sizes", type=int, nargs="+", default=[64, 80, 128], help="M of clustered codes")
    add("--dedicated-rows", type=int, nargs="+", default=[8192, 2048, 512, 32768], help="F")
    add("--only", nargs="+", metavar="POINT", help="some points, such as plain, clustered-64, dedicated-64-8192")
    add("--seeds", type=int, default=3, help="of plain, clustered and dedicated, the first of each")
    add("--parallel", type=int, default=1, help="runs at a time, of one thread each")
    add("--width", type=int, default=192, help="d")
    add("--layers", type=int, default=4)
    add("--rows", type=int, default=8, help="of the shards, in a step")
    add("--warmup-steps", type=int, default=40)
    add("--eval-sequences", type=int, default=24, help="held-out rows of each language")
    add("--search-sequences", type=int, default=8, help="the same where the learning rate is chosen")
    add("--rounds", type=int, default=11, help="steps whose median is the price")
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
