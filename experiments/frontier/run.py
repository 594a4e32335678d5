"""The frontier: embedding parameters against held-out loss, at equal steps and at equal processor time.

    python experiments/frontier/run.py --data shards --out frontier-experiment

One small network (ModernBERT's, 4 layers of width 192) over the whole vocabulary of the shards' tokenizer, with a plain
embedding, positional and clustered codes, and clustered codes with rows of their own for the most frequent tokens
(dedicated rows). experiments/equal_time says how a budget of processor time becomes steps, and how the runs go on from
budget to budget.

The learning rate is chosen for each kind of embedding by shorter runs; positional codes take that of clustered ones.

The same command continues where it was stopped. OUT has results.json, table.md and frontier.png, rewritten after every
part.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from outcome import write_outcome

from experiments.equal_time.experiment import DECAY_SHARE, Experiment, Training, option_parser, pool_of, steps_in
from experiments.equal_time.points import Point, all_points
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main


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
            for point in claim_points(points) if (seed or number) and not options.all_seeds else points:
                price = prices[point.name]
                steps, least = steps_in(budget, price), steps_in(budgets[number - 1], price) if number else 0
                ends = [each for each in sorted({equal, steps}) if least < each <= steps]
                stage[Training(point, rates[tuned_as(point)], seed)] = ends
            yield stage


def claim_points(points: list[Point]) -> list[Point]:
    """Return the points that carry a claim: the first ones of plain, clustered and dedicated."""
    kinds = ("plain", "clustered", "dedicated")
    firsts = {point.kind: point for point in reversed(points)}
    return [firsts[kind] for kind in kinds if kind in firsts]


def equal_steps(prices: dict[str, float], budgets: list[float]) -> int:
    """Return the number of steps at which all are compared: plain's in the longest budget; 0 without plain."""
    return steps_in(max(budgets), prices["plain"]) if "plain" in prices else 0


def tuned_as(point: Point) -> str:
    """Name the kind whose learning rate a point takes: positional codes take that of clustered ones."""
    return "clustered" if point.kind == "positional" else point.kind


def run(options: argparse.Namespace) -> None:
    """Run what is missing of the chosen points; write the outcome after every part."""
    experiment = Experiment(options, ("table_sizes", "dedicated_rows"))
    points = all_points(experiment.num_tokens, options.table_sizes, options.dedicated_rows)
    chosen = [point for point in points if not options.only or point.name in options.only]
    unknown = set(options.only or ()) - {point.name for point in chosen}
    if unknown:
        names = ", ".join(point.name for point in points)
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such point; there are {names}")
    prices = experiment.prices(chosen)
    kinds = list(dict.fromkeys(map(tuned_as, chosen)))
    firsts = {kind: next(point for point in points if point.kind == kind) for kind in kinds}
    missing = [point for point in firsts.values() if point.name not in prices]
    if missing:
        raise UserError(f"--only: the learning rate is chosen on {missing[0].name}; name it too")
    with pool_of(options.parallel) as pool:
        equal = equal_steps(prices, options.seconds)
        best = pool.map(lambda kind: search(experiment, firsts[kind], prices[firsts[kind].name], equal), kinds)
        rates = dict(zip(kinds, best, strict=True))
        outcome = partial(report, experiment, points, prices, rates)
        outcome()
        for stage in stages(options, chosen, prices, rates):
            done = [pool.submit(experiment.train_part, training, ends, outcome) for training, ends in stage.items()]
            for each in done:
                each.result()


def search(experiment: Experiment, point: Point, price: float, equal: int) -> float:
    """Return the best learning rate of a point, by runs that do not pass the steps at which all are compared."""
    options = experiment.options
    steps = max(options.warmup_steps + 1, steps_in(options.search_seconds, price))
    on_the_way = [equal] if 0 < equal < steps else []
    return experiment.tune(point, steps, options.search_sequences, on_the_way)


def report(experiment: Experiment, all_of: list[Point], prices: dict[str, float], rates: dict[str, float]) -> None:
    """Write the outcome of what has been trained, by whatever start with these budgets."""
    options, budgets = experiment.options, sorted(experiment.options.seconds)
    equal = equal_steps(prices, budgets)
    points = []
    for point in all_of:
        if point.name not in prices:
            continue
        steps = [steps_in(budget, prices[point.name]) for budget in budgets]
        trainings = [Training(point, rates[tuned_as(point)], seed) for seed in range(options.seeds)]
        points.append(
            {
                **dataclasses.asdict(point),
                "name": point.name,
                "embedding_parameters": experiment.embedding_parameters(point),
                "learning_rate": rates[tuned_as(point)],
                "seconds_a_step": prices[point.name],
                "steps_of_budgets": steps,
                "ends": [end for training in trainings for end in experiment.ends(training, [equal, *steps])],
            }
        )
    results = {
        "settings": experiment.settings | {"num_tokens": experiment.num_tokens, "decay_share": DECAY_SHARE},
        "budgets_seconds": budgets,
        "equal_steps": equal,
        "plain_parameters": experiment.num_tokens * options.width,
        "points": points,
        "not_run": [point.name for point in all_of if point.name not in prices],
        "searches": experiment.searches,
        "calibrations": experiment.calibrations(),
        "processor_hours": experiment.processor_hours(),
    }
    print(write_outcome(experiment.out, results), flush=True)


def main() -> None:
    """Parse the options and run."""
    parser = option_parser("Embedding parameters against held-out loss at equal cost.", "small_modernbert")
    add = parser.add_argument
    add("--search-seconds", type=float, default=120, help="of a run that chooses the learning rate")
    add("--search-sequences", type=int, default=8, help="held-out rows of each language where it is chosen")
    add("--table-sizes", type=int, nargs="+", default=[64, 80, 128], help="M of clustered codes")
    add("--dedicated-rows", type=int, nargs="+", default=[8192, 2048, 512, 32768], help="F")
    add("--only", nargs="+", metavar="POINT", help="some points, such as plain, clustered-64, dedicated-64-8192")
    add("--all-seeds", action="store_true", help="for every point, not only the first of its kind")
    parser.set_defaults(seconds=[360, 1080], seeds=3)
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
