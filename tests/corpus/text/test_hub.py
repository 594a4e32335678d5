"""Parquet files and sources that `datasets` opens: the same shards as from JSONL, rows joined, mistakes reported."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text import hub
from ksub_ds.corpus.text.hub import KNOWN, DatasetSource, HubDataset
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import find_text


@pytest.fixture(scope="module")
def english(tiny_text: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (tiny_text / "en.jsonl").read_text(encoding="utf-8").splitlines()]


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
    return path


def read(folder: Path) -> tuple[list[str], Counter[str]]:
    text = find_text(folder, splits=())["en"]
    return list(DocumentReader(text.sources, text.skipped)), text.skipped.counts


def test_parquet_files_are_read_as_jsonl_is(tmp_path: Path, english: list[str]) -> None:
    write_parquet(tmp_path / "one/en.parquet", [*english, None, "", "a\0b"])
    write_parquet(tmp_path / "two/en/part-0.parquet", list(english), column="raw_content")
    assert read(tmp_path / "one") == (english, Counter({"no_text_key": 1, "empty": 1, "nul_character": 1}))
    assert read(tmp_path / "two") == (english, Counter())


def test_bad_parquet_files_are_counted(tmp_path: Path, english: list[str]) -> None:
    good = write_parquet(tmp_path / "good.parquet", list(english)).read_bytes()
    write_parquet(tmp_path / "in/en/a.parquet", list(english), column="body")
    middle = len(good) // 2  # in the text
    torn = good[:middle] + b"\xff" * 99 + good[middle + 99 :]
    for name, content in {"b": good[:-100], "c": b"PAR1", "d": b"", "e": torn}.items():
        (tmp_path / f"in/en/{name}.parquet").write_bytes(content)
    write_parquet(tmp_path / "in/en/z.parquet", english[:2])
    texts, skipped = read(tmp_path / "in")
    assert texts[-2:] == english[:2]
    assert +skipped == {"no_text_column": 1, "damaged_parquet": 4}


def test_a_dataset_gives_the_shards_of_its_text(tmp_path: Path, tiny_tokenizer: Path, english: list[str]) -> None:
    """A local folder goes through `datasets` as a name of the hub does; streamed, as JSONL and as parquet."""
    (tmp_path / "jsonl").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in english)
    (tmp_path / "jsonl/en.jsonl").write_text(lines, encoding="utf-8")
    write_parquet(tmp_path / "hub/data/train-0.parquet", list(english))
    files = shard_text(ShardText(tmp_path / "jsonl", tiny_tokenizer, tmp_path / "a", sequence_length=64, workers=1))
    by_name = ShardText(None, tiny_tokenizer, tmp_path / "b", 64, workers=1, datasets=(str(tmp_path / "hub"),))
    streamed = shard_text(by_name)
    assert files["languages"]["en"]["files"] == streamed["languages"]["en"]["files"]
    stamp = (tmp_path / "b/en/part.json").stat().st_mtime_ns
    shard_text(by_name)  # nothing changed: nothing is done
    assert (tmp_path / "b/en/part.json").stat().st_mtime_ns == stamp
    write_parquet(tmp_path / "hub/data/train-0.parquet", english[:100])
    assert shard_text(by_name)["fingerprint"] != streamed["fingerprint"]


def test_text_of_a_folder_and_of_datasets_goes_together(tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path) -> None:
    write_parquet(tmp_path / "hub/train.parquet", ["one stone and one bird"] * 7)
    settings = ShardText(
        tiny_text,
        tiny_tokenizer,
        tmp_path / "out",
        64,
        0.0,
        1,
        datasets=(str(tmp_path / "hub"),),
        datasets_language="tr",
    )
    languages = shard_text(settings)["languages"]
    assert {name: entry["train"]["documents"] for name, entry in languages.items()} == {"el": 100, "en": 300, "tr": 47}


def save(folder: Path, texts: list[str], **columns: list[Any]) -> Path:
    """Write a data set as `datasets` does, in two files."""
    datasets.Dataset.from_dict({"text": texts, **columns}).save_to_disk(folder, num_shards=2)
    return folder


def test_a_saved_dataset_is_what_its_state_names(
    tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path, english: list[str]
) -> None:
    """With a cache of map() beside it, as the train split of several, by name and as the folder of a language."""
    save(tmp_path / "plain", english)
    save(tmp_path / "mapped", english)
    saved = datasets.load_from_disk(tmp_path / "mapped")
    saved.map(lambda row: {"text": row["text"].upper()}, load_from_cache_file=False)
    saved.filter(lambda row: len(row["text"]) > 80, load_from_cache_file=False)
    assert len(list((tmp_path / "mapped").glob("cache-*.arrow"))) > 1
    parts = {"train": english, "test": ["a stone"] * 50}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    ).save_to_disk(tmp_path / "splits")
    expected = list(DocumentReader(find_text(tiny_text, ("en",))["en"].sources, Skipped()))
    for name in ("plain", "mapped", "splits"):
        assert list(DatasetSource(str(tmp_path / name), "en").texts()) == expected
        (tmp_path / f"in-{name}").mkdir()
        shutil.copytree(tmp_path / name, tmp_path / f"in-{name}/en")
        texts, skipped = read(tmp_path / f"in-{name}")
        assert texts == expected and not set(skipped) - {"held_out_split", "cache", "not_data"}


def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", ["a", "b"])
    state = json.loads((folder / "state.json").read_text())
    for changes, words in (
        ({"_data_files": [{"filename": "data-00007-of-00008.arrow"}]}, "data-00007-of-00008.arrow, which is not there"),
        ({"_data_files": [{"filename": "../secret.arrow"}]}, "names no file of its folder"),
        ({"_data_files": 3}, "names no file of its folder"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices"),
    ):
        (folder / "state.json").write_text(json.dumps(state | changes))
        with pytest.raises(UserError, match=words):
            DatasetSource(str(folder), "en")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="has no configuration"):
        DatasetSource(f"{folder}:en", "en")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "test")
    with pytest.raises(UserError, match="without a split 'train', only test"):
        DatasetSource(str(tmp_path / "test"), "en")


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv"])
def test_files_may_differ_in_columns_that_are_not_needed(tmp_path: Path, form: str) -> None:
    tables = pa.table({"text": ["a", "b"]}), pa.table({"url": ["x", "y"], "text": ["c", "d"], "n": [1, 2]})
    for number, table in enumerate(tables):
        frame, path = table.to_pandas(), tmp_path / f"{number}.{form}"
        if form == "parquet":
            pq.write_table(table, path)
        elif form == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
    assert list(DatasetSource(str(tmp_path), "en").texts()) == ["a", "b", "c", "d"]


def test_the_column_of_a_dataset_can_be_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "Body": [b"a", "é".encode()]}), tmp_path / "train.parquet")
    assert list(DatasetSource(str(tmp_path), "en", TextLayout("Body")).texts()) == ["a", "é"]
    with pytest.raises(UserError, match='has no "body", only text, Body; give --text-column Body'):
        DatasetSource(str(tmp_path), "en", TextLayout("body"))


def test_rows_of_books_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"sentence number {number} of the book ." for number in range(1000)]
    write_parquet(tmp_path / "books/train.parquet", list(rows))
    monkeypatch.setitem(KNOWN, "bookcorpus", HubDataset(str(tmp_path / "books"), joined=KNOWN["bookcorpus"].joined))
    texts = list(DatasetSource("bookcorpus", "en").texts())
    assert "\n".join(texts).split("\n") == rows
    assert all(len(text) >= hub.JOINED_CHARACTERS - 1 for text in texts[:-1])
    assert len(texts) == 4


def test_mistakes_are_one_line(tmp_path: Path, tiny_tokenizer: Path) -> None:
    write_parquet(tmp_path / "body/train.parquet", ["x"], column="body")
    write_parquet(tmp_path / "test/test.parquet", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/train.jsonl").write_text('{"text": "x', encoding="utf-8")
    for name, words in (
        (str(tmp_path / "body"), 'no "text" or "raw_content", only id, body; give --text-column body'),
        (str(tmp_path / "test"), "train"),
        (str(tmp_path / "empty"), "cannot be opened"),
        (str(tmp_path / "body") + ":nosuch", "cannot be opened"),
        (str(tmp_path / "torn"), "repair its file"),
        ("", "--datasets '': write NAME"),
        ("/", "--datasets /: write NAME"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            DatasetSource(name, "en")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--input FOLDER, --datasets NAME"):
        shard_text(ShardText(None, tiny_tokenizer, tmp_path / "out"))
    with pytest.raises(UserError, match="--datasets-language"):
        shard_text(ShardText(None, tiny_tokenizer, tmp_path / "out", datasets=("x",), datasets_language="../x"))


def test_a_folder_is_the_same_by_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` names its files by whole paths."""
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text('{"text": "a river"}\n', encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    for path in ("d", "./d", "link", str(tmp_path / "d")):
        skipped = Skipped()
        DatasetSource(path, "en", skipped=skipped)
        assert skipped.counts == {"other_split": 1}, path


def test_files_of_one_name_in_several_folders_are_no_copies(tmp_path: Path) -> None:
    """Spark writes them so. Nor is a.txt a compressed form of a.TXT."""
    for year in (2020, 2021):
        write_parquet(tmp_path / f"hive/year={year}/part-0.parquet", [f"the river of {year}"])
    texts = list(DatasetSource(str(tmp_path / "hive"), "en").texts())
    assert sorted(texts) == ["the river of 2020", "the river of 2021"]
    (tmp_path / "en").mkdir()
    for name in ("a.txt", "a.TXT"):
        (tmp_path / "en" / name).write_text(f"a river in {name}", encoding="utf-8")
    assert len(read(tmp_path)[0]) == 2


def test_what_datasets_raises_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.jsonl").touch()
    (tmp_path / "card").mkdir()
    (tmp_path / "card/README.md").write_text("---\na: [\n---\n")
    (tmp_path / "card/x.jsonl").write_text('{"text": "x"}\n')
    for name in ("empty", "card"):
        with pytest.raises(UserError, match=f"--datasets .*{name}: (cannot be opened|its train split)"):
            DatasetSource(str(tmp_path / name), "en")


def test_a_folder_is_not_read_twice_or_in_part_silently(tmp_path: Path) -> None:
    rows = b"".join(b'{"text": "row %d of the river"}\n' % number for number in range(30))
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "train_a.jsonl").write_bytes(rows)
    (folder / "test.jsonl").write_bytes(rows + rows)
    (folder / "c.txt").write_bytes(b"a stone\n")
    skipped = Skipped()
    DatasetSource(str(folder), "en", skipped=skipped)
    assert skipped.counts == {"other_form": 1, "other_split": 1} and "c.txt" in skipped.examples["other_form"]
    (folder / "train_b.jsonl").write_bytes(rows)
    with pytest.raises(UserError, match=r"holds text twice: copy 1 \(first: train_b.jsonl is a copy"):
        DatasetSource(str(folder), "en")
    (folder / "train_b.jsonl").unlink()
    (folder / "train_d.jsonl.gz").write_bytes(gzip.compress(rows + rows)[:-20])
    source = DatasetSource(str(folder), "en")
    with pytest.raises(UserError, match=r"broke off \(.*\); run again, or repair its file"):
        list(source.texts())
