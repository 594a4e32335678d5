"""Fine-tuning and scoring on real XNLI: ours against transformers' Trainer as run_xnli sets it up.

    python benchmarks/finetune.py --data xnli --tokenizer sentencepiece.bpe.model --json finetune.json

Same model (untrained weights: speed does not depend on them), same rows, same batch size, same threads, float32 on a
CPU and bfloat16 on a GPU on both sides. transformers' run_xnli.py pads every row to max_length 128, its default
(`pad_to_max_length`); beside it stands Trainer with its dynamic padding, which run_xnli has as an option. Data is
found by KSUB_DATA when --data and --tokenizer are left out.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import print_table, save, verdict
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ksub_ds import positional_codes
from ksub_ds.common import distributed
from ksub_ds.evaluate.data.rows import Rows, RowSource
from ksub_ds.evaluate.data.tasks import LANGUAGES, XNLI_COLUMNS
from ksub_ds.evaluate.finetune.encoding import Encoded, encode, load_encoder
from ksub_ds.evaluate.finetune.loop import FineTuning, finetune
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.model.presets import preset_config

MAX_LENGTH, BATCH = 128, 32
TRAINING_BOUND, SCORING_BOUND = 1.7, 2.0


def build_model(num_tokens: int, preset: str) -> Any:
    """A classifier over positional codes."""
    torch.manual_seed(0)
    config = preset_config(preset, vocab_size=num_tokens)
    config.num_labels = 3
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return model_class(config, positional_codes(num_tokens, 3)).to(distributed.device())


def hf_dataset(rows: Rows, tokenizer: Any, padding: Any) -> Any:
    """The rows as run_xnli tokenises them."""
    import datasets

    def tokenise(batch: dict[str, list[str]]) -> Any:
        made = tokenizer(batch["premise"], batch["hypothesis"], padding=padding, max_length=MAX_LENGTH, truncation=True)
        return dict(made)

    columns = {"premise": rows.first, "hypothesis": rows.second, "label": [int(label) for label in rows.labels]}
    made = datasets.Dataset.from_dict(columns).map(tokenise, batched=True, remove_columns=["premise", "hypothesis"])
    return made


def trainer(model: Any, tokenizer: Any, padding: Any, train: Any = None) -> Any:
    """transformers' Trainer with run_xnli's settings; logging and saving off."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=2e-5,
        warmup_steps=0.06,
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not distributed.has_gpu(),
        bf16=distributed.has_gpu(),
    )
    collator = default_data_collator if padding == "max_length" else DataCollatorWithPadding(tokenizer)
    return Trainer(model=model, args=settings, train_dataset=train, data_collator=collator)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    if distributed.has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_of(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best of interleaved calls."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function))
    return best


def measure_training(rows: Rows, encoded: Encoded, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    """Examples a second of an epoch over some rows, tokenised beforehand on both sides."""
    precision = "bf16" if distributed.has_gpu() else "fp32"
    fixed, dynamic = (hf_dataset(rows, tokenizer, padding) for padding in ("max_length", False))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as work:
            settings = FineTuning(1, BATCH, 2e-5, seed=0, precision=precision, save_every_steps=10**9)
            model = build_model(len(tokenizer), options.preset)
            finetune(model, encoded, settings, lambda _: {"score": 0.0}, Path(work), "benchmark")

    def theirs(padding: Any, data: Any) -> Callable[[], None]:
        def run() -> None:
            trainer(build_model(len(tokenizer), options.preset), tokenizer, padding, data).train()

        return run

    functions = {
        "ours": ours,
        "Trainer, run_xnli": theirs("max_length", fixed),
        "Trainer, dynamic padding": theirs(False, dynamic),
    }
    return {name: len(rows) / best for name, best in best_of(functions, options.repeats).items()}


def measure_scoring(
    rows: list[Rows], encoder: Any, tokenizer: Any, options: argparse.Namespace
) -> tuple[dict[str, float], int]:
    """Rows a second over the test sets of all languages, from text to answers, nothing cached; and how many differ."""
    model = build_model(len(tokenizer), options.preset).eval()
    precision = "bf16" if distributed.has_gpu() else "fp32"
    answers: dict[str, list[int]] = {}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            first, *others = [encode(each, encoder, MAX_LENGTH, Path(cache)) for each in rows]
        answers["ours"] = predict(model, first.joined(others), precision).argmax(axis=1).tolist()

    def theirs() -> None:
        found: list[int] = []
        scorer = trainer(model, tokenizer, "max_length")
        for each in rows:
            output = scorer.predict(hf_dataset(each, tokenizer, "max_length"))
            found += output.predictions.argmax(axis=1).tolist()
        answers["theirs"] = found

    count = sum(map(len, rows))
    best = best_of({"ours": ours, "Trainer, run_xnli": theirs}, 1)
    differing = sum(a != b for a, b in zip(answers["ours"], answers["theirs"], strict=True))
    return {name: count / value for name, value in best.items()}, differing


def main() -> None:
    """Measure, print, keep."""
    base = Path(os.environ.get("KSUB_DATA", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(base / "xnli"))
    parser.add_argument("--tokenizer", type=Path, default=base / "tokenizer" / "sentencepiece.bpe.model")
    parser.add_argument("--preset", default="small", help="model size [small: 6 layers, d = 384]")
    parser.add_argument("--rows", type=int, default=512, help="training rows in a measurement")
    parser.add_argument("--test-rows", type=int, default=5010, help="of each of the 15 languages")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not Path(options.data).is_dir() or not options.tokenizer.exists():
        print("skipped: no XNLI at --data, or no --tokenizer (KSUB_DATA names the folder of both)")
        return
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    import datasets

    datasets.disable_progress_bars()
    if not distributed.has_gpu():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    encoder = load_encoder(str(options.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        encoder.save(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    source = RowSource(options.data)
    train = source.read("en", "train", XNLI_COLUMNS, options.rows)
    with tempfile.TemporaryDirectory() as cache:
        encoded = encode(train, encoder, MAX_LENGTH, Path(cache))
    training = measure_training(train, encoded, tokenizer, options)
    tests = [source.read(each, "test", XNLI_COLUMNS, options.test_rows) for each in LANGUAGES]
    scoring, differing = measure_scoring(tests, encoder, tokenizer, options)
    gain = {name: training["ours"] / value for name, value in training.items()}
    rows = [
        [name, f"{training[name]:.1f}", f"{gain[name]:.2f}x", _bound(name, gain[name], TRAINING_BOUND)]
        for name in training
    ]
    mean = encoded.lengths().mean()
    print_table(
        f"fine-tuning, examples/s ({options.rows} rows of {mean:.0f} tokens on average)",
        ["", "examples/s", "ours is", ""],
        rows,
    )
    gain_scoring = scoring["ours"] / scoring["Trainer, run_xnli"]
    rows = [[name, f"{value:.1f}"] for name, value in scoring.items()]
    rows.append(["ours is", f"{gain_scoring:.2f}x {verdict(gain_scoring, SCORING_BOUND)}"])
    rows.append(["answers that differ", f"{differing} of {sum(map(len, tests))}"])
    print_table(f"scoring, rows/s (15 languages x {options.test_rows} rows, tokenising included)", ["", ""], rows)
    result = {
        "preset": options.preset,
        "batch_size": BATCH,
        "training_rows": options.rows,
        "test_rows": sum(map(len, tests)),
        "mean_tokens": float(mean),
        "training_examples_per_second": training,
        "scoring_rows_per_second": scoring,
        "answers_that_differ": differing,
    }
    save(options.json, result)


def _bound(name: str, gain: float, bound: float) -> str:
    return verdict(gain, bound) if name == "Trainer, run_xnli" else ""


if __name__ == "__main__":
    main()
