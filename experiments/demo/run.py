"""The whole pipeline, small, on the CPU: text -> shards -> codes -> pretraining -> export -> a filled mask, a report.

    python experiments/demo/run.py                                     (what `make demo` runs)
    python experiments/demo/run.py --data FOLDER --tokenizer FILE      the same on your own text

Every step is a command that a user would type, printed before it runs. All results are written to --out (demo/), which
is emptied first. The demo fails unless the run resumes where it stopped and the held-out loss falls by at least one
nat.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.codes.positional import smallest_base
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.files import write_json
from ksub_ds.common.logging import read_lines
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from summary import check_and_report

ROOT = Path(__file__).resolve().parents[2]
MARKER = "demo.json"  # marks a folder as the demo's own, which may be emptied
STOP_AFTER = 0.4  # the fraction of the steps after which the run is interrupted


@dataclass(frozen=True)
class Size:
    """How much the demo does. Small batches and a high learning rate: many steps in a few minutes."""

    max_steps: int
    global_batch_size: int
    sequence_length: int
    peak_lr: float


OWN_CORPUS = Size(max_steps=900, global_batch_size=16, sequence_length=128, peak_lr=2e-3)
GIVEN_TEXT = Size(max_steps=600, global_batch_size=16, sequence_length=128, peak_lr=2e-3)


def headline(number: int, text: str) -> None:
    """Print a rule with the step's name."""
    print(f"\n── {number}. {text} ".ljust(100, "─"), flush=True)


def prepare_environment(out: Path) -> None:
    """Set the environment of every command: this Python first on the PATH, the CPU, caches under `out`."""
    cache = out / ".cache"
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "huggingface"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(cache / "torch_extensions")),
    }


def start(*command: str | Path) -> subprocess.Popen[bytes]:
    """Print a command and start it in the root of the source tree."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    return subprocess.Popen(list(map(str, command)), cwd=ROOT)


def run_command(*command: str | Path) -> None:
    """Print a command and run it to completion.

    Raises:
        UserError: it failed; its own message says why.
    """
    code = start(*command).wait()
    if code:
        raise UserError(f"exit code {code} from: {shlex.join(map(str, command))}")


def make_afresh(out: Path) -> None:
    """Empty the folder of an earlier demo; refuse any other folder that is not empty."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"{out}: not empty and not made by the demo; give another folder by --out")
        shutil.rmtree(out)
    write_json(out / MARKER, {"made_by": "experiments/demo/run.py"})


def stop_in_the_middle(command: list[str | Path], run: Path, step: int) -> int:
    """Start training, ask it to stop once it has passed `step`; return the step it stopped at."""
    training = start(*command)
    try:
        while training.poll() is None and last_step(run) < step:
            time.sleep(0.1)
        if training.poll() is None:
            print(f"$ touch {run / 'STOP'}", flush=True)
            (ROOT / run / "STOP").touch()
        code = training.wait()
    finally:
        if training.poll() is None:
            training.terminate()
    stopped_at = last_step(run)
    if code or stopped_at < step:
        raise UserError(f"training ended at step {stopped_at} with exit code {code}")
    return stopped_at


def look_inside(out: Path, data: Path) -> None:
    """Analyse the exported model and write the run's page."""
    analysis = out / "analysis"
    run_command("ksub", "analyze", out / "model", "--data", data, "--num-tokens", "6000", "--out", analysis)
    run_command("ksub", "report", out / "run", analysis, "--html", out / "report.html")


def last_step(run: Path) -> int:
    """Read the last optimizer step from RUN/metrics.jsonl; 0 if there is none."""
    lines = read_lines(ROOT / run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def demo(out: Path, data: Path | None, tokenizer: Path | None) -> None:
    """Run all steps, in order."""
    started = time.monotonic()
    make_afresh(out)
    prepare_environment(out)
    if out.is_relative_to(ROOT):
        out = out.relative_to(ROOT)  # as a user at the root of the source tree would type it
    size = GIVEN_TEXT if data else OWN_CORPUS

    headline(1, "text and tokenizer")
    if data is None:
        data = out / "text"
        run_command("python", "experiments/demo/corpus.py", "--out", data)
    if tokenizer is None:
        tokenizer = out / "tokenizer" / "sentencepiece.bpe.model"
        run_command("python", "experiments/demo/tokenizer.py", "--input", data, "--out", tokenizer)

    headline(2, "text to token shards")
    shards = out / "shards"
    run_command(
        *("python", "preprocessing/shard_text.py", "--input", data, "--tokenizer", tokenizer),
        *("--out", shards, "--sequence-length", str(size.sequence_length), "--validation-fraction", "0.02"),
    )
    run_command("ksub", "corpus", "stats", shards)

    headline(3, "a code for every token")
    codes = out / "codes.safetensors"
    rows = smallest_base(load_tokenizer(tokenizer).vocab_size, 3)
    run_command(
        *("ksub", "codes", "cluster", "--embeddings", shards),
        *("--num-tables", "3", "--table-size", str(rows), "--out", codes),
    )
    run_command("ksub", "codes", "inspect", codes)

    headline(4, "pretraining on two ranks, stopped in the middle")
    run = out / "run"
    (ROOT / out / "hostfile").write_text("localhost slots=2\n", encoding="utf-8")
    command: list[str | Path] = [
        *("launch/pretrain.sh", "--hostfile", out / "hostfile", "--preset", "tiny"),
        *("--codes", codes, "--data", shards, "--out", run, "--max-steps", str(size.max_steps)),
        *("--global-batch-size", str(size.global_batch_size), "--eval-every", str(size.max_steps // 4)),
        *("--peak-lr", str(size.peak_lr), "--eval-sequences", "8"),
    ]
    stopped_at = stop_in_the_middle(command, run, round(STOP_AFTER * size.max_steps))

    headline(5, f"the same command again: it resumes after step {stopped_at}")
    run_command(*command)

    headline(6, "export, and masks filled by AutoModelForMaskedLM in a new process")
    model = out / "model"
    run_command("ksub", "export", run, "--out", model)
    run_command("python", "experiments/demo/fill_mask.py", "--model", model)

    headline(7, "figures of what it has learned, and the report of the run")
    look_inside(out, data)

    headline(8, "summary")
    check_and_report(ROOT / out, size.max_steps, stopped_at)
    for name in ("shards", "codes.safetensors", "run", "model", "loss.png", "analysis/explore.html"):
        print(f"  {out / name}")
    print(f"  {time.monotonic() - started:.0f} s in all")
    print(f"The report of the run, for a browser: {(ROOT / out / 'report.html').as_uri()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, resume, export and query a small model.")
    parser.add_argument("--data", type=Path, help="folder of <lang>.jsonl.gz [the demo's own corpus]")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece .model or folder [trained on the text]")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything; emptied first")
    options = parser.parse_args()
    given = [path.resolve() if path else None for path in (options.data, options.tokenizer)]
    demo(options.out.resolve(), *given)


if __name__ == "__main__":
    sys.exit(run_main(main, resumes=False))
