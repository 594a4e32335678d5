"""Peak memory of shard_cc on hostile pages, each as large as a record may be.

    KSUB_DATA=DATA python benchmarks/corpus_hostile.py [--pages 1] [--shapes "endless word" ...] [--json out.json]

One run for each shape, on a WET file of --pages such pages. Target: below 1 GB.
"""

import argparse
import gzip
import itertools
import os
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import measuring

from ksub_ds.corpus.commoncrawl.wet import Limits

SIZE = Limits().record
SCRIPT = Path(__file__).parents[1] / "preprocessing" / "shard_cc.py"
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x9FA6)))
EVERYTHING = "".join(c for c in map(chr, range(33, 0x110000)) if c.isprintable() and not c.isspace())
TRIPLES = ["".join(letters) for letters in itertools.product(string.printable[:94], repeat=3)]

SHAPES: dict[str, Callable[[random.Random], str]] = {
    "endless word": lambda draw: "".join(draw.choices(string.ascii_lowercase, k=SIZE)),
    "endless word of ideographs": lambda draw: "".join(draw.choices(IDEOGRAPHS, k=SIZE // 3)),
    "all characters": lambda draw: "".join(draw.sample(EVERYTHING, k=len(EVERYTHING))) * (1 + SIZE // len(EVERYTHING)),
    "one character": lambda draw: draw.choice(string.ascii_lowercase) * SIZE,
    "one unknown character": lambda draw: chr(0x10FFFD - draw.randrange(999)) * (SIZE // 4),
    "a character a line": lambda draw: "\n".join(draw.choices(IDEOGRAPHS, k=SIZE // 4)),
    "empty paragraphs": lambda draw: f"first{draw.random()}" + "\n" * (SIZE - 99) + "last",
    "a million paragraphs": lambda draw: "\n".join(draw.sample(TRIPLES, k=len(TRIPLES))),
    "words of 5,000 letters": lambda draw: " ".join(
        "".join(draw.choices(string.ascii_lowercase, k=5000)) for _ in range(SIZE // 5001)
    ),
    "U+FDFA, normalised to 18": lambda draw: "\ufdfa" * (SIZE // 3 - draw.randrange(99)),
    "squared words": lambda draw: "".join(draw.choices("㌖㌕㌗㌀㌍㌫㌱㍂", k=SIZE // 3)),
}


def record(number: int, text: str) -> bytes:
    body = text.encode()[:SIZE].decode(errors="ignore").encode()
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <{number}>\r\nContent-Length: {len(body)}\r\n\r\n"
    return gzip.compress(head.encode() + body + b"\r\n\r\n", 1)


def peak(command: list[str]) -> tuple[int, int]:
    """Run; return the peak of the process in bytes, and the exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("KSUB_DATA"), help="folder with tokenizer/")
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: KSUB_DATA is not set; this benchmark needs XLM-R's tokenizer")
        return
    tokenizer = Path(options.data) / "tokenizer/sentencepiece.bpe.model"
    result = {}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(prefix="ksub-hostile-") as work:
            draw = random.Random(0)
            pages = [record(number, SHAPES[shape](draw)) for number in range(options.pages)]
            Path(work, "a.warc.wet.gz").write_bytes(b"".join(pages))
            command = [sys.executable, str(SCRIPT), "--input", f"{work}/a.warc.wet.gz", "--out", f"{work}/out"]
            # It is kept whatever language is identified.
            command += ["--tokenizer", str(tokenizer), "--langid-threshold", "0", "--min-length", "1"]
            result[shape] = peak(command)
    rows = [
        [shape, f"{rank / 1e6:.0f}", str(code), measuring.verdict(rank / 1e9, 1, at_least=False)]
        for shape, (rank, code) in result.items()
    ]
    title = f"Peak memory, {options.pages} page(s) of {SIZE >> 20} MiB"
    measuring.print_table(title, ["pages", "rank, MB", "exit code", "below 1 GB"], rows)
    measuring.save(options.json, {"pages": options.pages, "peaks": result})


if __name__ == "__main__":
    main()
