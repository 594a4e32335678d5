"""Shards and codes for a rehearsal without --data, by the project's own commands on the demo's generated text."""

import subprocess
import sys
from pathlib import Path

from trip import ROOT

DEMO = ROOT / "experiments" / "demo"


def make(folder: Path) -> Path:
    """Make shards/ and codes/ in a folder, and return it."""
    text, model, shards, codes = folder / "text", folder / "spm.model", folder / "shards", folder / "codes"
    codes.mkdir()
    ksub = ("-m", "ksub_ds.cli", "codes")
    size = ("--num-tables", "3", "--tokenizer", model)
    call(DEMO / "corpus.py", "--out", text, "--bytes-per-language", "30000")
    call(DEMO / "tokenizer.py", "--input", text, "--out", model, "--pieces", "1000")
    shape = ("--sequence-length", "64", "--validation-fraction", "0.05", "--workers", "1")
    call(ROOT / "preprocessing" / "shard_text.py", "--input", text, "--tokenizer", model, "--out", shards, *shape)
    call(*ksub, "positional", *size, "--out", codes / "positional.safetensors")
    call(
        *ksub,
        "cluster",
        *size[:2],
        "--embeddings",
        shards,
        "--table-size",
        "12",
        "--out",
        codes / "clustered.safetensors",
    )
    return folder


def call(*words: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
