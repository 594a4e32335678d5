"""Causal models at equal processor time: bits per byte against minutes, for plain, positional and clustered embeddings.

    python experiments/causal/run.py --data shards --out causal-experiment

One small Llama (4 layers of width 192) over the whole vocabulary of the shards' tokenizer. experiments/equal_time says
how a budget of processor time becomes steps, and how the runs go on from budget to budget. The learning rate is chosen
for each embedding by runs of the least budget; the best of them goes on to the other budgets.

At the end the best model is exported, and continues held-out text in five languages (continuations.py).

The same command continues where it was stopped. OUT has results.json, table.md and causal.png, rewritten after every
part, and continuations.md.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from outcome import write_outcome

from experiments.equal_time.experiment import DECAY_SHARE, KSUB, Experiment, Training, option_parser, pool_of, steps_in
from experiments.equal_time.points import Point, all_points
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import write_json

HERE = Path(__file__).resolve().parent
KINDS = ("plain", "positional", "clustered")


def run(options: argparse.Namespace) -> None:
    """Run what is missing, write the outcome after every part, and show what the best model writes."""
    experiment = Experiment(options, ("table_size",))
    points = [
        each for each in all_points(experiment.num_tokens, [options.table_size], []) if each.kind in options.kinds
    ]
    prices = experiment.prices(points)
    steps = {point: [steps_in(budget, prices[point.name]) for budget in sorted(options.seconds)] for point in points}
    check_budgets(options, points, prices)
    with pool_of(options.parallel) as pool:
        best = pool.map(lambda point: experiment.tune(point, steps[point][0], options.eval_sequences), points)
        rates = dict(zip(points, best, strict=True))
        trainings = {point: [Training(point, rates[point], seed) for seed in range(options.seeds)] for point in points}
        outcome = partial(report, experiment, prices, steps, trainings)
        for seed in range(options.seeds):
            for budget in range(len(options.seconds)):
                done = [
                    pool.submit(experiment.train_part, trainings[point][seed], [steps[point][budget]], outcome)
                    for point in points
                ]
                for each in done:
                    each.result()
    show(experiment, steps, trainings)


def check_budgets(options: argparse.Namespace, points: list[Point], prices: dict[str, float]) -> None:
    """Refuse a least budget that no run can be planned for.

    Raises:
        UserError: it buys no more steps than the warm-up takes.
    """
    dearest, least = max(prices[point.name] for point in points), min(options.seconds)
    if steps_in(least, dearest) <= options.warmup_steps:
        raise UserError(
            f"--seconds {least:g}: buys {steps_in(least, dearest)} of the dearest steps, of {dearest:.2f} s, and "
            f"--warmup-steps is {options.warmup_steps}; give at least {dearest * (options.warmup_steps + 1):.0f}"
        )


def report(
    experiment: Experiment,
    prices: dict[str, float],
    steps: dict[Point, list[int]],
    trainings: dict[Point, list[Training]],
) -> None:
    """Write the outcome of what has been trained."""
    rows = [
        {
            **dataclasses.asdict(point),
            "name": point.name,
            "embedding_parameters": experiment.embedding_parameters(point),
            "learning_rate": trainings[point][0].rate,
            "seconds_a_step": prices[point.name],
            "steps_of_budgets": steps[point],
            "ends": [end for training in trainings[point] for end in experiment.ends(training, steps[point])],
        }
        for point in steps
    ]
    results = {
        "settings": experiment.settings | {"num_tokens": experiment.num_tokens, "decay_share": DECAY_SHARE},
        "budgets_seconds": sorted(experiment.options.seconds),
        "points": rows,
        "searches": experiment.searches,
        "calibrations": experiment.calibrations(),
        "processor_hours": experiment.processor_hours(),
    }
    print(write_outcome(experiment.out, results), flush=True)


def show(experiment: Experiment, steps: dict[Point, list[int]], trainings: dict[Point, list[Training]]) -> None:
    """Export the best of the runs of seed 0 at the longest budget, and let it continue held-out text."""

    def loss(point: Point) -> float:
        return experiment.train(trainings[point][0], steps[point][-1], experiment.options.eval_sequences)["loss"]

    best = min(steps, key=loss)
    training, end = trainings[best][0], steps[best][-1]
    model = experiment.out / "export" / f"{training.name}-step{end}"
    experiment.command(model, *KSUB, "export", experiment.runs / training.name, "--out", model)
    text = experiment.out / "continuations.md"
    text.unlink(missing_ok=True)
    source = ("--model", model, "--data", experiment.options.data)
    experiment.command(text, HERE / "continuations.py", *source, "--out", text)
    write_json(experiment.out / "shown.json", {"model": training.name, "steps": end})


def main() -> None:
    """Parse the options and run."""
    parser = option_parser("Bits per byte of causal models at equal processor time.", "llama_small")
    parser.add_argument("--table-size", type=int, default=64, help="M of clustered codes")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of embeddings")
    parser.set_defaults(seconds=[40, 120, 300], seeds=1, rows=4, warmup_steps=10, eval_sequences=8)
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
