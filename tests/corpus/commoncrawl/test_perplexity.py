"""CCNet's buckets: normalisation, perplexity by the real kenlm against the formula, percentiles, bad folders."""

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.commoncrawl import perplexity
from ksub_ds.corpus.commoncrawl.perplexity import Buckets, load_buckets, normalise

# A trigram model in log10: n-gram -> (probability, back-off). `▁the ▁river` and `▁old ▁house ▁falls` are known.
NGRAMS: dict[tuple[str, ...], tuple[float, float]] = {
    ("<unk>",): (-2.5, 0.0),
    ("<s>",): (-99.0, -0.3),
    ("</s>",): (-1.2, 0.0),
    ("▁the",): (-0.7, -0.25),
    ("▁river",): (-1.1, -0.4),
    ("▁old",): (-1.3, -0.15),
    ("▁house",): (-1.4, -0.2),
    ("▁falls",): (-1.6, -0.1),
    ("▁0",): (-1.9, 0.0),
    ("<s>", "▁the"): (-0.4, -0.05),
    ("▁the", "▁river"): (-0.6, -0.35),
    ("▁old", "▁house"): (-0.5, -0.12),
    ("▁falls", "</s>"): (-0.3, 0.0),
    ("<s>", "▁the", "▁river"): (-0.2, 0.0),
    ("▁old", "▁house", "▁falls"): (-0.1, 0.0),
}


def log10_probability(words: list[str]) -> float:
    """Apply the back-off rule as it is defined: the longest known n-gram, and the cost of backing off to it."""
    known = [word if (word,) in NGRAMS else "<unk>" for word in words]
    history: tuple[str, ...] = ("<s>",)
    total = 0.0
    for word in [*known, "</s>"]:
        context = history[-2:]
        while (*context, word) not in NGRAMS:
            total += NGRAMS.get(context, (0.0, 0.0))[1]
            context = context[1:]
        total += NGRAMS[(*context, word)][0]
        history = (*history, word)
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as CCNet's: en.sp.model (whole words are pieces) and en.arpa."""
    pytest.importorskip("kenlm", reason="kenlm is not installed (pip install kenlm; it needs a C++ compiler)")
    import sentencepiece

    folder = tmp_path_factory.mktemp("lm")
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the old river falls on the old house 0", "the river falls 0 a house"] * 20),
        model_writer=pieces,
        model_type="word",
        vocab_size=12,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "en.sp.model").write_bytes(pieces.getvalue())
    lines = ["\\data\\"]
    lines += [f"ngram {n}={sum(len(ngram) == n for ngram in NGRAMS)}" for n in (1, 2, 3)]
    for n in (1, 2, 3):
        lines += ["", f"\\{n}-grams:"]
        for ngram, (probability, back_off) in NGRAMS.items():
            if len(ngram) == n:
                lines.append(f"{probability}\t{' '.join(ngram)}" + (f"\t{back_off}" if n < 3 else ""))
    (folder / "en.arpa").write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    return folder


def test_the_text_is_normalised_as_the_models_expect() -> None:
    assert normalise("  Ünë\tÇa va? ") == "uneca va?"
    assert normalise("Στις 12.345 ٣ １") == "στις 00.000 0 0"
    assert normalise("„a“ «b» —…．％【」") == '"a" "b"  - .... %["'
    assert normalise("one line\nand another") == "one lineand another"  # CCNet's way: see normalise
    assert normalise("a\ud800") == "a?"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The river", ["▁the", "▁river"]),
        ("the old house falls", ["▁the", "▁old", "▁house", "▁falls"]),
        ("The óld HOUSE falls 7", ["▁the", "▁old", "▁house", "▁falls", "▁0"]),
        ("river unheard falls", ["▁river", "▁unheard", "▁falls"]),
    ],
)
def test_perplexity_is_the_formula_s(folder: Path, text: str, pieces: list[str]) -> None:
    expected = 10 ** (-log10_probability(pieces) / (len(pieces) + 1))
    found = load_buckets(folder).perplexity("en", text)
    assert found == pytest.approx(expected, abs=0.051)  # it is rounded to one decimal
    assert found == round(expected, 1)


def test_a_very_long_page_is_judged_by_its_beginning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "LONGEST_JUDGED", len("the river "))
    assert load_buckets(folder).perplexity("en", "the river " + "unheard " * 9) == Buckets(folder).perplexity(
        "en", "the river"
    )


def test_buckets_follow_the_percentiles(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "lm")
    text = "river river river unheard"
    perplexity = Buckets(folder).perplexity("en", text)
    assert perplexity is not None
    assert load_buckets(folder).bucket("en", text) == ("head", perplexity)  # CCNet's 340 is far above
    for cutoffs, bucket in (
        ((perplexity + 0.1, perplexity + 1), "head"),
        ((perplexity, perplexity + 0.1), "middle"),
        ((1, perplexity), "tail"),
    ):
        (tmp_path / "lm/cutoffs.json").write_text(json.dumps({"en": cutoffs}))
        assert load_buckets(tmp_path / "lm").bucket("en", text) == (bucket, perplexity)


def test_what_cannot_be_judged_passes_as_all(folder: Path, tmp_path: Path) -> None:
    assert load_buckets(None).bucket("en", "the river") == ("all", None)
    assert load_buckets(folder).bucket("sw", "habari ya mto") == ("all", None)
    assert load_buckets(folder).bucket("en", " \n\x00 ") == ("all", None)
    for kind in ("sp.model", "arpa"):
        shutil.copy(folder / f"en.{kind}", tmp_path / f"sw.{kind}")
    bucket, perplexity = load_buckets(tmp_path).bucket("sw", "the river")  # a model, and no percentiles
    assert bucket == "all" and perplexity is not None and math.isfinite(perplexity)


def test_the_fingerprint_follows_models_and_percentiles(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "lm")
    seen = {load_buckets(None).fingerprint, load_buckets(folder).fingerprint}
    assert load_buckets(tmp_path / "lm").fingerprint in seen
    (tmp_path / "lm/cutoffs.json").write_text('{"en": [1, 2]}')
    seen.add(load_buckets(tmp_path / "lm").fingerprint)
    with (tmp_path / "lm/en.arpa").open("a") as stream:
        stream.write("\n")
    seen.add(load_buckets(tmp_path / "lm").fingerprint)
    assert len(seen) == 4


def test_bad_folders_are_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(change: Callable[[Path], object], word: str, language: str = "") -> None:
        copy = tmp_path / word
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(UserError, match=word) as caught:
            load_buckets(copy).bucket(language or "en", "the river")
        assert "\n" not in str(caught.value)

    with pytest.raises(UserError, match="no such folder"):
        load_buckets(tmp_path / "absent")
    refused(lambda copy: (copy / "en.arpa").unlink(), "arpa.bin")
    refused(lambda copy: (copy / "en.sp.model").unlink(), "en.sp.model")
    refused(lambda copy: (copy / "en.sp.model").write_bytes(b"\x00" * 99), "SentencePiece")
    refused(lambda copy: (copy / "en.arpa").write_bytes(b"no model\n" * 9), "KenLM")
    refused(lambda copy: (copy / "cutoffs.json").write_text('{"en": [3, 2]}'), "smaller one first")
    refused(lambda copy: (copy / "cutoffs.json").write_text("[]"), "must be like")
