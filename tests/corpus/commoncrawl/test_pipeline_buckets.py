"""shard_cc with language models: buckets against kenlm and the formula, languages without a model, other models."""

import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl import page_selection
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.pipeline import shard_cc

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("wet_files", Path(__file__).with_name("wet_files.py"))
assert spec is not None and spec.loader is not None
wet_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wet_files)

kenlm: Any = pytest.importorskip("kenlm", reason="kenlm is not installed (pip install kenlm; it needs a C++ compiler)")


def plain(text: str) -> str:
    """CCNet's normalisation, as far as these pages need it."""
    letters = unicodedata.normalize("NFD", text.lower())
    return re.sub("[0-9]", "0", "".join(c for c in letters if c >= " " and unicodedata.category(c) != "Mn"))


def write_models(folder: Path, language: str, texts: list[str], step: float) -> None:
    """A SentencePiece model whose pieces are words, and a bigram model in ARPA's form over them."""
    import sentencepiece

    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([plain(text) for text in texts]), model_writer=pieces, model_type="word",
        vocab_size=30, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / f"{language}.sp.model").write_bytes(pieces.getvalue())
    words = sorted({"▁" + word for text in texts for word in plain(text).split()})[:40]
    unigrams = ["-2.5\t<unk>", "-99\t<s>\t-0.3", "-1.5\t</s>"]
    unigrams += [f"{-1 - step * (place % 5):.2f}\t{word}\t-0.2" for place, word in enumerate(words)]
    bigrams = [f"-0.4\t{one} {two}" for one, two in itertools.pairwise(words)]
    lines = ["\\data\\", f"ngram 1={len(unigrams)}", f"ngram 2={len(bigrams)}", "", "\\1-grams:", *unigrams]
    lines += ["", "\\2-grams:", *bigrams, "", "\\end\\", ""]
    (folder / f"{language}.arpa").write_text("\n".join(lines), encoding="utf-8")


def perplexities(folder: Path, language: str, texts: list[str]) -> list[float]:
    """10^(-log10 probability / (pieces + 1)), rounded to one decimal: by kenlm, of the pieces of the plain text."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{language}.sp.model"))
    model = kenlm.Model(str(folder / f"{language}.arpa"))
    found = []
    for text in texts:
        words = pieces.encode(plain(text), out_type=str)
        log10 = sum(probability for probability, _, _ in model.full_scores(" ".join(words)))
        found.append(round(10 ** (-log10 / (len(words) + 1)), 1))
    return found


def buckets(found: list[float], cutoffs: list[float]) -> list[str]:
    return ["head" if x < cutoffs[0] else "middle" if x < cutoffs[1] else "tail" for x in found]


def written(folder: Path) -> dict[str, tuple[str, float | None]]:
    """Text -> bucket and perplexity of everything in CCNet's JSON lines; the file's name says the same."""
    result = {}
    for path in folder.glob("*.json.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]:
            record = json.loads(line)
            assert path.name == f"{record['language']}_{record['bucket']}_0000.json.gz"
            result[record["raw_content"]] = record["bucket"], record["perplexity"]
    return result


def test_buckets_of_a_run_and_of_one_with_other_models(
    make_documents: Any, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {}
    for language in ("en", "el", "tr"):
        lines = make_documents(language, 60, seed=7)
        pages[language] = ["\n".join(lines[at : at + 5]) for at in range(0, 60, 5)]
    (tmp_path / "in").mkdir()
    wet = wet_files.wet_file([text for texts in pages.values() for text in texts])
    (tmp_path / "in" / "a.warc.wet.gz").write_bytes(wet)
    first, second, out, text_out = (tmp_path / name for name in ("lm", "other lm", "out", "text"))
    expected: dict[Path, dict[str, tuple[str, float | None]]] = {}
    for folder, languages, step, kept in (
        (first, ("en", "tr"), 0.3, ("head", "tail", "all")),
        (second, ("en", "tr", "el"), 0.1, ("middle",)),
    ):
        folder.mkdir()
        cutoffs = {}
        expected[folder] = {}
        for language in languages:
            write_models(folder, language, pages[language], step)
            found = perplexities(folder, language, pages[language])
            cutoffs[language] = [float(each) for each in np.quantile(found, [0.3, 0.6])]
            judged = zip(pages[language], buckets(found, cutoffs[language]), found, strict=True)
            expected[folder] |= {text: (bucket, x) for text, bucket, x in judged if bucket in kept}
        (folder / "cutoffs.json").write_text(json.dumps(cutoffs))
    expected[first] |= dict.fromkeys(pages["el"], ("all", None))
    assert {bucket for bucket, _ in expected[first].values()} == {"head", "tail", "all"} and expected[second]

    command = [sys.executable, str(ROOT / "preprocessing" / "shard_cc.py"), "--input", str(tmp_path / "in")]
    command += ["--tokenizer", str(tiny_tokenizer), "--out", str(out), "--text-out", str(text_out)]
    command += ["--lm-models", str(first), "--keep-buckets", "head", "tail", "all", "--keep-work"]
    command += ["--min-length", "100", "--sequence-length", "64"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert written(text_out) == expected[first]
    quality = json.loads((out / "report.json").read_text())["stages"]["quality"]
    assert {language: row["documents_out"] for language, row in quality.items()} == {
        language: sum(text in expected[first] for text in texts) for language, texts in pages.items()
    }
    assert "by perplexity" in done.stdout

    # Other models: what was read and judged stays, pages are selected and tokenised anew.
    def stamps(stage: str) -> list[int]:
        return sorted(path.stat().st_mtime_ns for path in (out / "work").glob(stage))

    kept_stages, redone = ("read/*", "dedup-*/judged/*"), ("select/*.json", "tokenise/*.json", "text/*.json")
    before = {stage: stamps(stage) for stage in (*kept_stages, *redone)}
    settings = ShardCC(
        tiny_tokenizer, out, (tmp_path / "in",), text_out=text_out, keep_work=True, min_length=100, sequence_length=64,
        lm_models=second, keep_buckets=("middle",),
    )  # fmt: skip
    monkeypatch.setattr(page_selection, "hash_paragraphs", None)
    report = shard_cc(settings, MPIComm())
    assert written(text_out) == expected[second]
    assert all(before[stage] == stamps(stage) for stage in kept_stages)
    assert all(before[stage] != stamps(stage) for stage in redone)
    assert report["stages"]["length"]["el"]["documents_in"] == sum(text in expected[second] for text in pages["el"])
