"""The choice of documents: by text and seed alone, to the byte, whatever files they lie in."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.shards.writer import split_of
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT
from ksub_ds.corpus.text.sources import find_text
from ksub_ds.evaluate.lm.documents import Choice, ChosenText, choose


def write(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def chosen(folder: Path, choice: Choice, language: str = "en") -> ChosenText:
    return choose(find_text(folder)[language], DEFAULT_LAYOUT, choice)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents, of which some are long, in letters of one to four bytes."""
    made = tmp_path_factory.mktemp("choice")
    write(made / "en.jsonl", [f"{number} {'aß中😀'[number % 4] * (5 + number * 7 % 50)}" for number in range(40)])
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 50)))
def test_limits_hold_and_smaller_choices_begin_larger_ones(
    folder: Path, num_bytes: int, seed: int, count: int | None
) -> None:
    everything = chosen(folder, Choice(seed)).texts
    assert len(everything) == 40
    found = chosen(folder, Choice(seed, num_bytes, count))
    size = sum(len(text.encode()) for text in found.texts)
    assert size <= num_bytes and found.available == 40
    if found.cut:
        assert size > num_bytes - 4, "a character has at most four bytes"
    elif count is None or len(found.texts) < count:
        assert found.texts == everything or size == num_bytes
    for text, whole in zip(found.texts, everything, strict=False):
        assert whole.startswith(text)
    assert found.texts[:-1] == everything[: len(found.texts)][:-1]
    assert count is None or len(found.texts) <= count


def test_the_seed_draws_and_the_order_of_files_does_not(folder: Path, tmp_path: Path) -> None:
    first, second = (chosen(folder, Choice(seed, 400)).texts for seed in (0, 1))
    assert first != second
    texts = chosen(folder, Choice()).texts
    (tmp_path / "en").mkdir()
    write(tmp_path / "en" / "b.jsonl.gz", sorted(texts)[:15])
    write(tmp_path / "en" / "a.jsonl", sorted(texts)[:14:-1])
    assert chosen(tmp_path, Choice(0, 400)).texts == first


def test_odd_files_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_bytes(
        b'{"text": "one"}\nnot json\n{"text": 3}\n{"other": "two"}\n{"text": ""}\n{"text": "\xff"}\n{"text": "three"}\n'
    )
    text = find_text(tmp_path)["en"]
    assert sorted(choose(text, DEFAULT_LAYOUT, Choice()).texts) == ["one", "three"]
    assert text.skipped.total() == 5


def test_held_out_documents_are_those_of_the_shards(folder: Path) -> None:
    everything, held_out = chosen(folder, Choice()).texts, chosen(folder, Choice(held_out=0.3))
    assert set(held_out.texts) == {text for text in everything if split_of(text.encode(), 0.3) == "validation"}
    assert 0 < len(held_out.texts) == held_out.available < 40
