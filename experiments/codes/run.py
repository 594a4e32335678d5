"""Do the codes help? One small model at an equal number of steps with plain, positional and clustered codes.

    python experiments/codes/run.py --data shards --out codes-experiment
    python experiments/codes/run.py --data text --tokenizer sentencepiece.bpe.model --out codes-experiment --seeds 3

Four layers of width 192 over rows of 128 tokens, the 32,000 most frequent tokens of the vocabulary, K = 3 tables of
40 rows. The vectors that are clustered come from co-occurrence in the same rows. Two controls start from these vectors,
so that a plain embedding also has what clustering knows of the text.

With --refine the question is another one, whether a trained model's own states give better codes (refinement.py).

Two configurations train at a time, each on one core. Finished ones are not trained again: the same command continues
where it was stopped, and more --seeds add to the results. OUT/results/ has a JSON file for each; OUT/results.json,
OUT/table.md and OUT/loss.png are made from them at the end.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from material import open_shards, prepare
from outcome import write_outcome
from refinement import NAMES as REFINED
from refinement import refine
from training import Training, train

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import format_seconds, get_logger


@dataclass(frozen=True)
class Configuration:
    """One model of the comparison."""

    name: str
    codes: str
    initialise: bool = False


CONFIGURATIONS = (
    Configuration("plain", "plain"),
    Configuration("positional", "positional"),
    Configuration("clustered-random", "clustered-random"),
    Configuration("clustered-matched", "clustered-matched"),
    Configuration("clustered-matched-aligned", "clustered-matched-aligned"),
    Configuration("plain, from vectors", "plain", initialise=True),
    Configuration("clustered-matched-aligned, from vectors", "clustered-matched-aligned", initialise=True),
)


def result_path(out: Path, name: str, seed: int) -> Path:
    """Name the JSON file of one configuration and seed."""
    return out / "results" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def is_done(path: Path, training: Training) -> bool:
    """Return whether a result is there.

    Raises:
        UserError: it is there with other settings.
    """
    if not path.exists():
        return False
    if read_json(path)["settings"] != asdict(training):
        raise UserError(f"{path}: was trained with other settings; give another --out, or remove OUT/results")
    return True


def find_jobs(options: argparse.Namespace, training: Training) -> dict[str, tuple[Any, ...]]:
    """Return what is left to train, by name: a function and its arguments."""
    folder = options.out / "material"
    jobs: dict[str, tuple[Any, ...]] = {}
    for seed in range(options.seeds):  # all configurations with the first seed come before the second seed
        if options.refine:
            paths = {name: result_path(options.out, name, seed) for name in REFINED}
            if not all(is_done(path, training) for path in paths.values()):
                jobs[f"refinement, seed {seed}"] = (refine, folder, paths, training, seed)
            continue
        for each in CONFIGURATIONS:
            path = result_path(options.out, each.name, seed)
            if (not options.only or each.name in options.only) and not is_done(path, training):
                settings = (each.name, each.codes, each.initialise, training, seed)
                jobs[f"{each.name}, seed {seed}"] = (train, folder, path, *settings)
    return jobs


def experiment(options: argparse.Namespace) -> None:
    """Prepare the data, train what is missing, write the outcome."""
    training = Training(options.steps, options.batch_size, options.peak_lr, options.precision, options.decoder_bias)
    jobs = find_jobs(options, training)
    dataset = open_shards(options.data, options.tokenizer, options.out)
    prepare(dataset, options.out, options.num_tokens, options.table_size, seed=0)
    log, started = get_logger(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.parallel, mp_context=context) as pool:
        running = {pool.submit(*job): name for name, job in jobs.items()}
        for number, future in enumerate(as_completed(running), start=1):
            future.result()
            left = (time.monotonic() - started) / number * (len(running) - number)
            log.info(f"done: {running[future]} ({number} of {len(running)}), ETA {format_seconds(left)}")
    names = dict.fromkeys([*(each.name for each in CONFIGURATIONS), *REFINED])
    paths = [result_path(options.out, name, seed) for name in names for seed in range(options.seeds)]
    print(write_outcome(options.out, [read_json(path) for path in paths if path.exists()]))


def main() -> None:
    """Parse the options and run.

    Raises:
        UserError: an option out of range.
    """
    names = [each.name for each in CONFIGURATIONS]
    parser = argparse.ArgumentParser(description="Pretrain one small model with plain, positional and clustered codes.")
    parser.add_argument("--data", type=Path, required=True, help="a shards folder, or a folder of <lang>.jsonl[.gz]")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece .model or folder; needed for text")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--steps", type=int, default=800, help="[800: 2 to 4 minutes per configuration]")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step [8: 1,024 tokens]")
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder")
    parser.add_argument("--decoder-bias", choices=("zero", "frequency"), default="zero", help="its initial values")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. SEEDS - 1 of weights, rows and masks")
    parser.add_argument("--num-tokens", type=int, default=32_000, help="N of the small vocabulary")
    parser.add_argument("--table-size", type=int, default=40, help="M of each of the three tables")
    parser.add_argument("--parallel", type=int, default=2, help="configurations that train at a time")
    parser.add_argument("--refine", action="store_true", help="codes from a model's own states (refinement.py) instead")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}")
    options = parser.parse_args()
    for name in ("steps", "batch_size", "seeds", "parallel"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.table_size**3 < options.num_tokens:
        raise UserError(f"--table-size {options.table_size}: three tables code fewer than {options.num_tokens} tokens")
    experiment(options)


if __name__ == "__main__":
    sys.exit(run_main(main))
