"""Memory of a rank on hostile pages: the measured peak, and the limits that bound it."""

import gzip
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksub_ds.common.languages import LANGUAGES
from ksub_ds.corpus.commoncrawl import page_selection
from ksub_ds.corpus.commoncrawl.inputs import describe
from ksub_ds.corpus.commoncrawl.langid import load_identifier
from ksub_ds.corpus.commoncrawl.page_selection import Selection, select_file
from ksub_ds.corpus.commoncrawl.perplexity import load_buckets
from ksub_ds.corpus.commoncrawl.wet import Limits
from ksub_ds.corpus.shards import writer as shard_writer

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("wet_files", Path(__file__).with_name("wet_files.py"))
assert spec is not None and spec.loader is not None
wet_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wet_files)

# The script, then its peak memory (resource.getrusage would include that of the tests' process).
MEASURED = """
import atexit, re, runpy, sys
status = lambda: print("peak kB", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
atexit.register(status)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def hostile_pages(letters: str) -> list[str]:
    """Pages as large as a record may be: words without an end, characters that become many, lines of nothing."""
    size = Limits().record
    draw = random.Random(0)
    return [
        "".join(draw.choices(letters, k=size)),
        "".join(draw.choices(letters, k=size - 20)) + "<UNK>ꙮ",  # the name of an unknown token, and one
        "\ufdfa" * (size // 12) + "a" * (size * 3 // 4),  # one character that is normalised to 18, blanks among them
        "first" + "\n" * (size - 9) + "last",
    ]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_the_worst_pages_stay_below_1_gb(ksub_data: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "a.warc.wet.gz", "wb") as stream:
        for number, text in enumerate(hostile_pages("abcdefghijklmnopqrstuvwxyz")):
            stream.write(gzip.compress(wet_files.record(number, text), 1))
    command = [sys.executable, "-c", MEASURED, str(ROOT / "preprocessing" / "shard_cc.py"), "--input"]
    command += [str(tmp_path / "in"), "--tokenizer", str(ksub_data / "tokenizer" / "sentencepiece.bpe.model")]
    command += ["--out", str(tmp_path / "out"), "--langid-threshold", "0"]  # else no page has a language
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)  # so that it is not copied
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("kept 3 of 4 pages"), done.stdout  # two words are left of the last one
    assert int(lines[-1].removeprefix("peak kB ")) * 1024 < 850e6


def test_a_batch_counts_urls_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.warc.wet.gz"
    pages = [wet_files.record(number, "a", url="u" * 50_000 if number < 40 else "u") for number in range(100)]
    path.write_bytes(wet_files.member(*pages))
    batches = []
    select_batch = page_selection.select_batch

    def watched(batch: list[Any], *rest: Any) -> list[Any]:
        batches.append(len(batch))
        return select_batch(batch, *rest)

    monkeypatch.setattr(page_selection, "select_batch", watched)
    monkeypatch.setattr(page_selection, "BATCH_CHARACTERS", 10_000)
    selection = Selection(load_identifier(threshold=0), load_buckets(None), LANGUAGES, ("all",), 1)
    file = describe(path, path.name)
    select_file(
        file, page_selection.content_hash(file), None, tmp_path / "documents", deduplication=None, selection=selection
    )
    assert batches[:40] == [1] * 40 and sum(batches) == 100 and max(batches) == 20


def test_files_of_long_rows_hold_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "TOKENS_PER_FILE", 200)
    (tmp_path / "en").mkdir()
    for length, sizes in ((64, [3, 3, 1]), (300, [1] * 7), (8, [7])):
        writer = shard_writer.ShardWriter(tmp_path / "en", "en", "train", length)
        writer.write(np.zeros((7, length), dtype=np.int32))
        writer.close()
        assert [file["sequences"] for file in writer.files] == sizes
