"""Do translations help? Pretrain a small model with and without pairs, and transfer it from English to other languages.

    python experiments/tlm/run.py --data xnli --tokenizer sentencepiece.bpe.model --out tlm-experiment

Both models read MultiNLI's training sentences, of which the other languages' are machine translations (material.py):
one of them sentence by sentence, the other half of its rows as pairs, a sentence and its translation, with words of
both sides masked (`ksub pretrain --tlm-share 0.5`). Shards, codes, weights at the start, steps and schedule are the
same, and so are the languages' shares of the tokens. Then each is fine-tuned on the English training pairs and tested
on XNLI's test set of every language.

The same command continues where it was stopped. OUT has results.json, table.md and tlm.png, rewritten after every
model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from outcome import write_outcome

from experiments.equal_time.experiment import KSUB, Experiment, Training
from experiments.equal_time.points import Point
from experiments.tlm.material import ENGLISH, make_shards
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import get_logger

ARMS = ("sentences", "pairs")
SHARED = (
    *("steps", "rate", "share", "table_size", "languages", "epochs", "finetuning_rate"),
    *("pieces", "sequence_length"),
)


class TransferExperiment(Experiment):
    """The two models of every seed: pretraining, fine-tuning, tests.

    Args:
        options: of the command line; `data` is the folder of shards.
        xnli: folder of XNLI's files.
    """

    def __init__(self, options: argparse.Namespace, xnli: Path):
        super().__init__(options, SHARED)
        self.xnli, self.point = xnli, Point("clustered", options.table_size)

    def training(self, arm: str, seed: int) -> Training:
        """Return the pretraining of a model."""
        return Training(self.point, self.options.rate, seed, self.options.share if arm == "pairs" else 0.0)

    def answers(self, arm: str, seed: int) -> Path:
        """Return the folder of a model's evaluation on XNLI."""
        return self.out / "xnli" / self.training(arm, seed).name

    def make(self, arm: str, seed: int) -> None:
        """Pretrain, export, fine-tune and test a model, as far as that is not done."""
        options, training = self.options, self.training(arm, seed)
        self.train(training, options.steps, options.eval_sequences)
        model, folder = self.out / "models" / training.name, self.answers(arm, seed)
        self.command(model, *KSUB, "export", self.runs / training.name, "--out", model)
        tuning = ("--epochs", options.epochs, "--learning-rate", options.finetuning_rate, "--seeds", seed)
        tested = ("--languages", ENGLISH, *options.languages, "--precision", "fp32", "--attention", "sdpa")
        source = ("--model", model, "--data", self.xnli, "--setting", "cross-lingual", "--out", folder)
        self.command(folder / "results.json", *KSUB, "evaluate", "xnli", *source, *tuning, *tested)

    def models(self) -> list[dict[str, Any]]:
        """Return what is known of the models that have been tested."""
        found = []
        for seed in range(self.options.seeds):
            for arm in ARMS:
                folder = self.answers(arm, seed)
                if not (folder / "results.json").exists():
                    continue
                (finetuning,) = read_json(folder / "results.json")["finetuning"].values()
                heldout = self.evaluation(self.training(arm, seed), self.options.steps)
                about = {"arm": arm, "seed": seed, "pretraining": heldout, "finetuning": finetuning}
                found.append(about | read_json(folder / "predictions.json"))
        return found


def run(options: argparse.Namespace) -> None:
    """Make the material and the models, seed by seed, and write the outcome after each."""
    material, length = options.out / "material", options.sequence_length
    shards = make_shards(options.data, options.languages, options.tokenizer, options.pieces, length, material)
    experiment = TransferExperiment(argparse.Namespace(**vars(options) | {"data": shards}), options.data)
    for seed in range(options.seeds):
        for arm in ARMS:
            get_logger().info(f"seed {seed}, {arm}")
            experiment.make(arm, seed)
            settings = experiment.settings | {"num_tokens": experiment.num_tokens}
            table = write_outcome(options.out, settings, experiment.models(), experiment.processor_hours())
            print(table, flush=True)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Cross-lingual transfer with and without pairs in pretraining.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of XNLI, with train.jsonl.gz of every language")
    add("--tokenizer", type=Path, required=True, help="XLM-R's SentencePiece model")
    add("--out", type=Path, required=True, help="folder for everything")
    add("--languages", nargs="+", default=["ar", "de", "fr", "sw"], help="beside English [ar de fr sw]")
    add("--seeds", type=int, default=3, help="of weights, rows, masks and fine-tuning [3]")
    add("--share", type=float, default=0.5, help="of the rows that are pairs [0.5]")
    add("--steps", type=int, default=2000, help="of pretraining [2000]")
    add("--rate", type=float, default=1e-3, help="learning rate of pretraining [1e-3]")
    add("--epochs", type=int, default=3, help="of fine-tuning [3]")
    add("--finetuning-rate", type=float, default=4e-4, help="[4e-4]")
    add("--pieces", type=int, default=32_000, help="of the vocabulary [32000]")
    add("--table-size", type=int, default=64, help="M of the codes [64]")
    add("--preset", default="small_modernbert", help="whose network is trained, in another size")
    add("--width", type=int, default=192, help="d [192]")
    add("--layers", type=int, default=4, help="[4]")
    add("--rows", type=int, default=8, help="of a step [8]")
    add("--sequence-length", type=int, default=128, help="tokens of a row [128]")
    add("--warmup-steps", type=int, default=40, help="[40]")
    add("--eval-sequences", type=int, default=64, help="held-out rows of each language and pair [64]")
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
