"""Do small models learn XNLI? Pretrain plain, positional and clustered models on a CPU and fine-tune them.

    python experiments/xnli/run.py --text text --data xnli --tokenizer sentencepiece.bpe.model --out xnli-experiment

The vocabulary is cut to the pieces that the text uses most (vocabulary.py); models have 6 layers of width 384 (10.6M
parameters), ModernBERT's or RoBERTa's (--preset). Each step is a command of the project, and finished steps are not
repeated: the same command continues where it was stopped. OUT/results.json and OUT/table.md are rewritten after every
model, so they can be read at any time. The fine-tuning's learning rate is not Table 6's: a model that has
read little must learn much from the pairs.
"""

import argparse
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from baselines import logistic_regression

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import read_lines
from ksub_ds.evaluate.data.tasks import LANGUAGES
from ksub_ds.evaluate.result_tables import percent, render, write_text
from ksub_ds.pretrain.checkpoint import checkpoint_name
from ksub_ds.pretrain.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("clustered", "plain", "positional", "dedicated")  # the last: clustered, with dedicated rows
DEDICATED_ROWS = 2_048


class Steps:
    """Commands that run once each, and how long they took; several threads may run different ones."""

    def __init__(self, out: Path):
        self._path, self._lock = out / "seconds.json", threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = read_json(self._path) if self._path.exists() else {}

    def run(self, name: str, made: Path, *command: Any) -> None:
        """Run a Python command unless `made` is there; it must be there afterwards."""
        if made.exists():
            return
        words = [sys.executable, *map(str, command)]
        print(f"+ {shlex.join(words)}", flush=True)
        start = time.monotonic()
        try:
            done = subprocess.run(words, check=False)
        finally:  # the time until an interruption counts too
            with self._lock:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
                write_json(self._path, self.seconds)
        if done.returncode or not made.exists():
            raise UserError(f"{name}: failed with exit code {done.returncode}; its message is above")


def experiment(options: argparse.Namespace) -> None:
    """Run all steps; write the table after each model."""
    out, ksub = options.out, ("-m", "ksub_ds.cli")
    if "en" not in options.languages:
        raise UserError(
            "--languages: must include en, because the models learn from its pairs and the baselines are tested on it"
        )
    check_settings(out / "results.json", _all_told(options))
    steps = Steps(out)
    tokenizer, shards = out / "vocabulary.model", out / "shards"
    cut = (Path(__file__).with_name("vocabulary.py"), "--tokenizer", options.tokenizer, "--text", options.text)
    text = ("--languages", *options.languages)
    steps.run("vocabulary", tokenizer, *cut, *text, "--pieces", options.pieces, "--out", tokenizer)
    shard = (ROOT / "preprocessing/shard_text.py", "--input", options.text, "--tokenizer", tokenizer, "--out", shards)
    steps.run("shards", shards / "manifest.json", *shard, *text, "--sequence-length", 128, "--workers", 1)
    make_codes(steps, out, tokenizer, shards, ksub)
    baselines = out / "baselines.json"
    if not baselines.exists():
        write_json(baselines, logistic_regression(str(options.data)))
    outcome(options, steps)

    def one(kind: str) -> None:
        pretrain_and_evaluate(kind, options, steps, ksub)
        with written:
            outcome(options, steps)

    written = threading.Lock()
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(one, options.only))


def check_settings(results: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix models of other settings in one table; each command checks its own options itself."""
    before = read_json(results)["settings"] if results.exists() else {}
    for key in ("preset", "languages", "pieces"):
        if key in before and before[key] != settings[key]:
            raise UserError(f"--{key} {settings[key]}: {results} was made with {before[key]}; give another --out")


def make_codes(steps: Steps, out: Path, tokenizer: Path, shards: Path, ksub: tuple[str, ...]) -> None:
    """Make positional codes with M = ceil(N^(1/3)), and clustered codes with a quarter more rows.

    The clustered ones stand alone, and beside dedicated rows for the most frequent tokens.
    """
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    rows = 1
    while rows**3 < load_tokenizer(tokenizer).vocab_size:
        rows += 1
    codes = {kind: out / f"{kind}.safetensors" for kind in ("positional", "clustered", "dedicated")}
    sizes = ("--tokenizer", tokenizer, "--num-tables", 3)
    steps.run(
        "positional codes", codes["positional"], *ksub, "codes", "positional", *sizes, "--out", codes["positional"]
    )
    cluster = ("codes", "cluster", "--embeddings", shards, "--num-tables", 3, "--table-size", rows + rows // 4)
    steps.run("clustered codes", codes["clustered"], *ksub, *cluster, "--out", codes["clustered"])
    dedicate = ("codes", "dedicate", codes["clustered"], "--rows", DEDICATED_ROWS, "--data", shards)
    steps.run("dedicated rows", codes["dedicated"], *ksub, *dedicate, "--out", codes["dedicated"])


def pretrain_and_evaluate(kind: str, options: argparse.Namespace, steps: Steps, ksub: tuple[str, ...]) -> None:
    """Pretrain, export and fine-tune one model, with every seed."""
    out = options.out / kind
    codes = ("--plain",) if kind == "plain" else ("--codes", options.out / f"{kind}.safetensors")
    length = ("--max-steps", options.steps, "--save-every-steps", 100, "--eval-every", options.steps)
    run = ("pretrain", "--preset", options.preset, *codes, "--data", options.out / "shards", "--out", out / "run")
    last = RunFolder(out / "run").checkpoints / checkpoint_name(options.steps)
    run += (*length, "--global-batch-size", options.rows, "--precision", options.precision, "--gradient-clipping", 1)
    run += ("--decoder-bias", "frequency", "--dropout", options.dropout)
    run += ("--attention", "eager", "--micro-batch-size", options.rows)  # the fastest on a CPU
    steps.run(f"{kind}: pretraining", last, *ksub, *run)
    model = out / kind
    steps.run(f"{kind}: export", model / "config.json", *ksub, "export", out / "run", "--out", model)
    tuning = ("--epochs", options.epochs, "--learning-rate", options.learning_rate, "--precision", options.precision)
    cell = ("--setting", options.setting, "--seeds", *range(options.seeds), "--out", out / "xnli")
    cell += ("--languages", *options.languages, "--attention", "eager")
    evaluate = ("evaluate", "xnli", "--model", model, "--data", options.data, *cell, *tuning)
    steps.run(f"{kind}: fine-tuning and test", out / "xnli" / "results.json", *ksub, *evaluate)


def outcome(options: argparse.Namespace, steps: Steps) -> None:
    """Write results.json and table.md of the results so far."""
    out = options.out
    baselines = read_json(out / "baselines.json")
    models = {kind: read_json(out / kind / "xnli" / "results.json") for kind in KINDS if _is_done(out, kind)}
    rows = [[name, percent(value), "", ""] for name, value in baselines.items()]
    for kind, result in models.items():
        english = [percent(seed["accuracy"]["en"]) for seed in result["seeds"].values()]
        cells = [percent(result["test"]["en"]["accuracy"]), " ".join(english), percent(result["average"])]
        rows.append([kind, *cells])
    rows += [[kind, "not run", "", ""] for kind in options.only if kind not in models]
    seconds = sum(steps.seconds.values())
    title = f"XNLI, {options.setting}, {options.preset} on a CPU"
    table = render(title, ["model", "en", "en, each seed", "average"], rows, "markdown")
    told = f"\nPretraining on {' '.join(options.languages)}: {options.steps} steps of {options.rows} x 128 tokens; "
    told += f"{options.epochs} epochs of fine-tuning; {seconds / 60:.0f} minutes, the sum of all steps, "
    write_text(out / "table.md", table + told + f"{options.at_once} model(s) at a time.\n")
    kept = ("test", "average", "seeds", "finetuning")
    summary = {kind: {key: result[key] for key in kept} for kind, result in models.items()}
    for kind, about in summary.items():  # held-out loss at the end of pretraining
        about["pretraining"] = read_lines(RunFolder(out / kind / "run").evaluation)[-1]
    results = {"settings": _all_told(options), "baselines": baselines, "models": summary, "seconds": steps.seconds}
    write_json(out / "results.json", results)


def _all_told(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for results.json: only the name of a path, because the rest depends on this machine."""
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}


def _is_done(out: Path, kind: str) -> bool:
    return (out / kind / "xnli" / "results.json").exists()


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description="Pretrain small models on text, fine-tune and test them on XNLI.")
    parser.add_argument("--text", type=Path, required=True, help="folder of <lang>.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="XLM-R's SentencePiece model")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), help="of pretraining and test [all 15]")
    parser.add_argument("--data", type=Path, required=True, help="XNLI's folder, or facebook/xnli")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    networks = ("small_modernbert", "small")
    parser.add_argument("--preset", default=networks[0], choices=networks, help="the network [small_modernbert]")
    parser.add_argument("--steps", type=int, default=10_000, help="of pretraining [10000]")
    parser.add_argument("--rows", type=int, default=32, help="of 128 tokens in a step of pretraining [32]")
    parser.add_argument("--dropout", type=float, default=0.0, help="of pretraining [0: few passes over little text]")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning [5]")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="of fine-tuning [4e-4]")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings per model [3]")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS, help="models [all]")
    parser.add_argument("--pieces", type=int, default=32_000, help="of the vocabulary")
    parser.add_argument("--at-once", type=int, default=1, help="models that train at the same time [1]")
    parser.add_argument("--setting", default="cross-lingual", choices=("cross-lingual", "translate-train-all"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    experiment(parser.parse_args())


if __name__ == "__main__":
    sys.exit(run_main(main))
