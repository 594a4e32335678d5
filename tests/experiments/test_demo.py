"""The demo's corpus and summary: what does not need a training run (`make demo` is the test of the rest)."""

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece

import corpus  # experiments/demo/ is on pytest's pythonpath (setup.cfg)
import run
import summary
import tokenizer
from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import LANGUAGES

LEXICONS = Path(corpus.__file__).parent / "lexicon"


@pytest.mark.parametrize("language", LANGUAGES)
def test_lexicon_is_whole(language: str) -> None:
    lexicon = corpus.read_lexicon(LEXICONS / f"{language}.txt")
    assert (len(lexicon.topics), len(lexicon.things), len(lexicon.times)) == (16, 10, 8)
    assert len(set(lexicon.numbers)) == 10
    assert all(len(objects) == 3 and len(places) == 2 for _, _, objects, places in lexicon.topics)
    assert all(len(set(adjectives)) >= 2 for _, adjectives in lexicon.things)
    assert all("{S}" in template and "{V}" in template for template in lexicon.statements)


def test_corpus_is_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        documents = corpus.write_corpus(tmp_path / folder, bytes_per_language=3000, seed=0)
    assert sorted(documents) == list(LANGUAGES)
    for language in LANGUAGES:
        first, second = ((tmp_path / folder / f"{language}.jsonl.gz").read_bytes() for folder in ("first", "second"))
        assert first == second
        rows = [json.loads(line) for line in gzip.decompress(first).decode().splitlines()]
        assert len(rows) == documents[language]
        assert sum(len(row["text"].encode()) for row in rows) >= 3000
        assert not any(mark in row["text"] for row in rows for mark in "{}|")


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("who reads? the student.", "en", "Who reads? The student."),
        ("¿quién lee? el niño.", "es", "¿Quién lee? El niño."),
        ("ilk. ırmak.", "tr", "İlk. Irmak."),
        ("ποιος; ο γιος.", "el", "Ποιος; Ο γιος."),
    ],
)
def test_sentences_start_with_a_capital(text: str, language: str, expected: str) -> None:
    assert corpus.capitalise(text, language) == expected


def test_vocabulary_in_the_order_of_languages(tmp_path: Path) -> None:
    """Each language's own pieces lie together, and nothing is segmented in another way."""
    corpus.write_corpus(tmp_path, bytes_per_language=20_000, seed=0)
    model = tokenizer.train(tmp_path, pieces=6000, documents_per_language=100)
    ordered = tokenizer.order_by_language(model, tmp_path, documents_per_language=100)
    before, after = (sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (model, ordered))
    for language in LANGUAGES:
        text = next(tokenizer.texts(tmp_path / f"{language}.jsonl.gz", 1))
        assert after.encode(text, out_type=str) == before.encode(text, out_type=str)
    greek = [i for i in range(len(after)) if any("α" <= letter <= "ω" for letter in after.id_to_piece(i))]
    middle = greek[len(greek) // 10 : -len(greek) // 10]  # a few pieces of no use stand at the end
    assert len(middle) > 100
    assert middle[-1] - middle[0] < 1.1 * len(middle)


def test_sparkline_falls_from_the_highest_bar_to_the_lowest() -> None:
    line = summary.sparkline([float(x) for x in range(600, 0, -1)], width=60)
    assert len(line) == 60
    assert (line[0], line[-1]) == ("█", "▁")
    assert list(line) == sorted(line, reverse=True)
    assert summary.sparkline([2.0]) == "▁"


def test_only_a_demo_folder_is_made_afresh(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not made by the demo"):
        run.make_afresh(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    run.make_afresh(tmp_path / "demo")
    (tmp_path / "demo" / "old").touch()
    run.make_afresh(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [run.MARKER]
