"""From WET files to token shards: pages per second and core, against datatrove and CCNet; ranks; memory.

    KSUB_DATA=DATA python benchmarks/corpus.py [--datatrove-python ENV/bin/python] [--copies N] [--json out.json]

1. All stages but language identification (read, check, hash, deduplicate, filter, tokenise, pack), one process on
   one core, against the same stages built from datatrove (corpus_datatrove.py: WarcReader, sentence deduplication
   set to lines, DocumentTokenizer), on the same files, in turns. datatrove needs a separate environment
   (pip install "datatrove[io,processing]" spacy orjson). Target: 8 x the pages per second. Opening the tokenizer takes
   the same time for any input, so that a small one shows less: with `--copies`, each file is read so many times, its
   lines marked (a WET file of Common Crawl has some 40,000 pages).
2. The same run with language identification; against the figures of CCNet's paper (Wenzek et al. 2020, section 4.3),
   measured on their machines and pages: 600 documents/s/core for hashing, 40 for everything after it. Theirs include
   the download, and a language model that takes 13 % of the time. Targets: 5 x and 10 x.
3. Two ranks against one. Target: 1.7 x.
4. Memory per rank while the input grows ten times. Target: flat, that is below 1.25 times the smallest.

"Seconds" are processor seconds of the process (corpus_timed.py), so that other work on the machine counts less. Two
ranks are compared by wall time, which is meaningful on an idle machine only, and by the critical path: of each stage
the processor seconds of the busier rank, without waiting, plus what is done once.
"""

import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

import argparse
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring

from ksub_ds.corpus.commoncrawl.wet import Page, read_wet
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

CCNET_HASH, CCNET_MINE = 600, 40  # documents/s/core, from the paper
GROWTH = (1, 2, 5, 10)
RANK_FILES = 60  # enough that opening and copying the tokenizer, 4 s of one rank, matters little


def run(wet: Path, work: Path, tokenizer: Path, identify: bool = True, ranks: int = 1) -> list[dict[str, Any]]:
    """Run afresh and return what each rank measured; a single rank gets one core."""
    out, result = work / "out", work / "result.json"
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).with_name("corpus_timed.py")
    command = [sys.executable, str(script), str(wet), str(out), str(tokenizer), str(int(identify)), str(result)]
    start = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if ranks == 1 else ["mpirun", "-n", str(ranks)]
    subprocess.run([*start, *command], check=True, stderr=subprocess.DEVNULL)
    return json.loads(result.read_text())


def run_datatrove(python: Path, wet: Path, work: Path, tokenizer: Path) -> dict[str, Any]:
    """Run datatrove on one core."""
    folder = work / "datatrove"
    shutil.rmtree(folder, ignore_errors=True)
    script = Path(__file__).with_name("corpus_datatrove.py")
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), str(python), str(script)]
    command += [str(wet), str(folder), str(tokenizer), "300"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def grow(sources: Sequence[Path], folder: Path, copies: int) -> Path:
    """Make a folder of `copies` WET files from each one given, without equal paragraphs in different copies."""
    folder.mkdir(parents=True, exist_ok=True)
    for copy, (place, source) in itertools.product(range(copies), enumerate(sources)):
        path = folder / f"{copy:05d}-{place:05d}.warc.wet.gz"
        if path.exists():
            continue
        mark = "".join("abcdefghij"[int(digit)] for digit in str(copy))  # the hashes do not tell digits apart
        pages = [item for item in read_wet(source) if isinstance(item, Page)]
        with open(path, "wb") as stream:
            for number, page in enumerate(pages):
                body = "\n".join(f"{line} {mark}" for line in page.text.split("\n")).encode()
                header = (
                    "WARC/1.0\r\nWARC-Type: conversion\r\n"
                    f"WARC-Target-URI: {page.url}/{copy}\r\nWARC-Date: {page.date}\r\n"
                    f"WARC-Record-ID: <urn:uuid:00000000-0000-{place:04x}-{copy:04x}-{number:012x}>\r\n"
                    f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                stream.write(gzip.compress(header.encode() + body + b"\r\n\r\n", 1))
    return folder


def total(seconds: dict[str, float], *names: str) -> float:
    """Return the sum of some stages, or of all."""
    return sum(seconds[name] for name in names) if names else sum(seconds.values())


def compare(options: argparse.Namespace, wet: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Parts 1 and 2."""
    tokenizer_folder = work / "tokenizer"
    load_tokenizer(tokenizer).save(tokenizer_folder)
    ours = theirs = whole = None
    for _ in range(options.repeats):  # in turns
        found = run(wet, work, tokenizer, identify=False)[0]
        ours = found if ours is None or total(found["seconds"]) < total(ours["seconds"]) else ours
        if options.datatrove_python:
            other = run_datatrove(options.datatrove_python, wet, work, tokenizer_folder / "tokenizer.json")
            theirs = other if theirs is None or total(other["seconds"]) < total(theirs["seconds"]) else theirs
        found = run(wet, work, tokenizer)[0]
        whole = found if whole is None or total(found["seconds"]) < total(whole["seconds"]) else whole
    assert ours is not None and whole is not None, "there is at least one repeat"
    documents, seconds = whole["documents"], whole["seconds"]
    result: dict[str, Any] = {"ours": ours, "with identification": whole, "datatrove": theirs}
    rows = [[name, f"{value:.2f}", f"{documents / value:,.0f}"] for name, value in seconds.items()]
    title = f"{documents:,} pages, {whole['bytes'] / 1e6:.0f} MB of text, one core"
    measuring.print_table(title, ["stage", "seconds", "pages/s"], rows)
    hashing = documents / total(seconds, "read", "deduplicate")
    mining = documents / (total(seconds) - total(seconds, "read", "deduplicate"))
    result |= {"hash": hashing, "mine": mining}
    rows = [
        ["read, hash, deduplicate", f"{hashing:,.0f}", f"CCNet's hash, {CCNET_HASH}", f"{hashing / CCNET_HASH:.1f}"],
        ["everything after", f"{mining:,.0f}", f"CCNet's mine, {CCNET_MINE}", f"{mining / CCNET_MINE:.1f}"],
    ]
    verdicts = [measuring.verdict(hashing / CCNET_HASH, 5), measuring.verdict(mining / CCNET_MINE, 10)]
    speed = ours["documents"] / total(ours["seconds"])
    if theirs is not None:
        other_speed = theirs["documents"] / total(theirs["seconds"])
        result["ratio"] = speed / other_speed
        name = f"datatrove, {other_speed:,.0f}"
        rows.append(["all but identification", f"{speed:,.0f}", name, f"{speed / other_speed:.1f}"])
        verdicts.append(measuring.verdict(speed / other_speed, 8))
    header = ["what", "pages/s/core", "against", "ratio", "target"]
    rows = [[*row, verdict] for row, verdict in zip(rows, verdicts, strict=True)]
    measuring.print_table("Against others (CCNet: their figures, their machines)", header, rows)
    return result


def measure_memory(source: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Part 4."""
    curve = []
    for copies in GROWTH:
        wet = grow([source], work / f"grown-{copies}", copies)
        measured = run(wet, work, tokenizer)[0]
        curve.append({key: measured[key] for key in ("documents", "bytes", "memory")} | {"files": copies})
    ratio = max(entry["memory"] for entry in curve) / curve[0]["memory"]
    rows = [
        [f"{e['files']}", f"{e['documents']:,}", f"{e['bytes'] / 1e6:.0f}", f"{e['memory'] / 1e6:.0f}"] for e in curve
    ]
    measuring.print_table("Memory of one rank", ["files", "pages", "MB of text", "peak, MB"], rows)
    print(f"\ngrown ten times: {ratio:.2f} x the memory, {measuring.verdict(ratio, 1.25, at_least=False)}")

    return {"memory": curve, "memory ratio": ratio}


def compare_ranks(options: argparse.Namespace, source: Path, tokenizer: Path, work: Path) -> dict[str, Any]:
    """Part 3."""
    wet = grow([source], work / "ranks", RANK_FILES)
    runs: dict[int, list[list[dict[str, Any]]]] = {1: [], 2: []}
    for count in (1, 2) * options.repeats:
        runs[count].append(run(wet, work, tokenizer, ranks=count))
    wall = {count: min(max(rank["wall"] for rank in found) for found in runs[count]) for count in runs}
    path = {count: min(critical_path(found, runs[1][0][0]) for found in runs[count]) for count in runs}
    ratios = {"wall": wall[1] / wall[2], "critical path": path[1] / path[2]}
    rows = [
        ["wall time", f"{wall[1]:.1f}", f"{wall[2]:.1f}", f"{ratios['wall']:.2f}"],
        ["critical path", f"{path[1]:.1f}", f"{path[2]:.1f}", f"{ratios['critical path']:.2f}"],
    ]
    measuring.print_table("Two ranks (seconds)", ["", "one", "two", "ratio"], rows)
    load = os.getloadavg()[0]
    verdicts = ", ".join(f"{name} {measuring.verdict(value, 1.7)}" for name, value in ratios.items())
    print(f"\nload of the machine {load:.1f}; {verdicts}")
    return {"wall": wall, "critical path": path, "ratios": ratios, "load": load}


def critical_path(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> float:
    """Return the processor seconds of the busiest rank of each stage, plus those of one rank outside of units."""
    stages = alone["units"].keys()
    outside = total(alone["seconds"]) - total(alone["units"])
    return outside + sum(max(rank["units"].get(stage, 0.0) for rank in ranks) for stage in stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("KSUB_DATA"), help="folder with wet/, tokenizer/")
    parser.add_argument("--datatrove-python", type=Path, help="python of an environment with datatrove")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="of each file, in parts 1 and 2")
    parser.add_argument("--part", choices=("all", "compare", "ranks", "memory"), default="all")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: KSUB_DATA is not set; this benchmark needs WET files")
        return
    data = Path(options.data)
    tokenizer = data / "tokenizer/sentencepiece.bpe.model"
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ksub-corpus-") as folder:
        work = Path(folder)
        source = min((data / "wet").glob("*.wet.gz"))
        if options.part in ("all", "compare"):
            sources = sorted((data / "wet").glob("*.wet.gz"))
            wet = data / "wet" if options.copies == 1 else grow(sources, work / "compared", options.copies)
            result |= compare(options, wet, tokenizer, work)
        if options.part in ("all", "ranks"):
            result |= compare_ranks(options, source, tokenizer, work)
        if options.part in ("all", "memory"):
            result |= measure_memory(source, tokenizer, work)
    measuring.save(options.json, result)


if __name__ == "__main__":
    main()
