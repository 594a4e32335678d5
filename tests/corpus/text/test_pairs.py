"""Parallel text: odd names and rows are counted, pairs stay whole, and shards of pairs are made as others are."""

import contextlib
import filecmp
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import MANIFEST, ShardDataset
from ksub_ds.corpus.statistics import corpus_table
from ksub_ds.corpus.text import pipeline
from ksub_ds.corpus.text.pairs import PairReader, find_pairs, pair_of_name
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.tokenizers.loading import load_tokenizer


def row(**sides: Any) -> str:
    return json.dumps({"translation": sides}, ensure_ascii=False)


def write_pairs(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read_pairs(folder: Path) -> tuple[list[tuple[str, str]], Skipped]:
    ((pair, text),) = find_pairs(folder).items()
    return list(PairReader(text, pair)), text.skipped


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("en-sw", ("en", "sw")),
        ("sw-en", ("en", "sw")),
        ("en-sw-train", ("en", "sw")),
        ("eng_Latn-swh_Latn", ("en", "sw")),
        ("zh_cn-en", ("en", "zh-CN")),
        ("pt-BR-en", ("en", "pt-BR")),
        ("en-pt-BR", ("en", "pt-BR")),
        ("zh-Hant-en", ("en", "zh-Hant")),
        ("zh-cn-en", ("en", "zh-cn")),
        ("pt-br-en", None),
        ("en-en", None),
        ("en-eng", None),
        ("en", None),
        ("data-final", None),
        ("README", None),
    ],
)
def test_names(name: str, pair: tuple[str, str] | None) -> None:
    assert pair_of_name(name) == pair


def test_odd_rows_are_counted_once_each(tmp_path: Path) -> None:
    lines = [
        row(en="one", sw="moja"),
        row(sw="mbili", en="two"),
        json.dumps({"en": "three", "sw": "tatu"}),
        json.dumps({"swh_Latn": "nne", "eng_Latn": "four"}),
        row(en="no other"),
        row(en="another", de="eine andere"),
        row(en=None, sw="null"),
        row(de="neither", fr="aucun"),
        row(en=" ", sw="blank"),
        row(en=5, sw="a number"),
        row(en="half \ud800", sw="nusu").replace("\ud800", "\\ud800"),
        json.dumps({"translation": ["one", "moja"]}),
        '"a string"',
        "no json",
        "",
    ]
    folder = tmp_path / "parallel"
    folder.mkdir()
    text = "\n".join(lines).encode("utf-8", "surrogatepass") + b'\n{"en": "\xff", "sw": "bad"}\n'
    text += row(en="x" * 10_000_001, sw="long").encode() + b"\n" + row(en="last", sw="mwisho").encode()
    (folder / "sw-en.jsonl").write_bytes(text)
    pairs, skipped = read_pairs(folder)
    assert pairs == [("one", "moja"), ("two", "mbili"), ("three", "tatu"), ("four", "nne"), ("last", "mwisho")]
    assert skipped.counts == {
        "missing_side": 4,
        "empty": 1,
        "no_text_key": 1,
        "lone_surrogate": 1,
        "no_pair": 2,
        "bad_json": 1,
        "not_utf8": 1,
        "too_long": 1,
    }
    assert skipped.examples["missing_side"] == 'sw-en.jsonl, line 5: no "sw", only en'
    assert "line 12" in skipped.examples["no_pair"] and "en and of sw" in skipped.examples["no_pair"]


def test_gzip_cut_short_and_other_forms(tmp_path: Path) -> None:
    folder = tmp_path / "parallel"
    lines = [row(en=f"{number} {number * 7919}", sw=f"{number}") for number in range(5000)]
    whole = gzip.compress("\n".join(lines).encode())
    folder.mkdir()
    (folder / "en-sw.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "en-sw.txt").write_text("not read")
    (folder / "notes.jsonl").write_text("{}")
    (folder / ".hidden-x.jsonl").write_text("{}")
    others = Skipped()
    ((pair, text),) = find_pairs(folder, others=others).items()
    pairs = list(PairReader(text, pair))
    assert 500 < len(pairs) < 5000 and pairs[0] == ("0 0", "0")
    assert dict(text.skipped.counts) == {"damaged_gzip": 1}
    assert dict(others.counts) == {"no_language": 2, "hidden": 1}


def test_both_orders_are_one_pair_and_copies_count_once(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p", "en-sw.jsonl", [row(en="one", sw="moja")])
    write_pairs(folder, "sw-en.jsonl", [row(sw="mbili", en="two")])
    (folder / "sw-en.json").write_bytes((folder / "en-sw.jsonl").read_bytes())
    (folder / "en-sw").mkdir()
    write_pairs(folder / "en-sw", "test.jsonl", [row(sw="nje", en="held out")])
    ((pair, text),) = find_pairs(folder, ()).items()
    assert pair == ("en", "sw")
    assert list(PairReader(text, pair)) == [("one", "moja"), ("two", "mbili")]
    assert dict(text.skipped.counts) == {"held_out_split": 1, "copy": 1}


def test_tables(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    nested = pa.table({"translation": [{"en": "one", "sw": "moja"}, {"en": "two", "sw": None}], "id": [1, 2]})
    flat = pa.table({"eng_Latn": ["three", "four"], "sw": ["tatu", "nne"], "score": [0.5, 0.25]})
    pq.write_table(nested, folder / "en-sw.parquet")
    with pa.ipc.new_stream(folder / "en-sw-train.arrow", flat.schema) as stream:
        stream.write_table(flat)
    (folder / "en-sw").mkdir()
    pq.write_table(flat.rename_columns(["source", "target", "score"]), folder / "en-sw" / "other.parquet")
    whole = (folder / "en-sw.parquet").read_bytes()
    (folder / "en-sw" / "cut.parquet").write_bytes(whole[:-20])
    (folder / "en-sw" / "packed.parquet.gz").write_bytes(gzip.compress(whole))
    pairs, skipped = read_pairs(folder)
    assert sorted(pairs) == [("four", "nne"), ("one", "moja"), ("three", "tatu")]
    assert dict(skipped.counts) == {
        "missing_side": 1,
        "no_text_column": 1,
        "damaged_parquet": 1,
        "compressed_table": 1,
    }
    assert 'no "translation", no en or sw, only source, target, score' in skipped.examples["no_text_column"]


FAR = pa.array([2**62], pa.timestamp("us"))  # beyond Python's year 9999
SIDES = [pa.array(["one"]), pa.array(["moja"])]
BLOWN_UP = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["long" * 100]))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"translation": FAR}, "no_text_column"),
        ({"translation": ["one"]}, "no_text_column"),
        ({"translation": pa.ListArray.from_arrays(pa.array([0, 1000]), BLOWN_UP)}, "no_text_column"),
        ({"translation": pa.StructArray.from_arrays([SIDES[0], FAR], ["en", "sw"])}, "no_text_column"),
        ({"translation": pa.StructArray.from_arrays(SIDES, ["en", "en"])}, "damaged_parquet"),
        ({"translation": pa.StructArray.from_arrays([*SIDES, FAR], ["en", "sw", "when"])}, "damaged_parquet"),
        ({"en": FAR, "sw": ["moja"]}, "no_text_column"),
    ],
)
def test_tables_of_other_types_are_counted(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "p" / "en-sw.parquet")
    pairs, skipped = read_pairs(tmp_path / "p")
    assert pairs == [] and skipped.counts[reason] == 1 and "no_pair" not in skipped.counts


@pytest.mark.parametrize("names", [[], ["en.jsonl"], ["en-sw.jsonl", "swa-de.jsonl"]])
def test_folders_without_pairs_and_two_spellings_are_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "p").mkdir()
    for name in names:
        write_pairs(tmp_path / "p", name, [row(en="a", sw="b")])
    with pytest.raises(UserError) as caught:
        find_pairs(tmp_path / "p")
    assert "\n" not in str(caught.value) and ("swa" in str(caught.value) or "holds no pair" in str(caught.value))


def sentences(rows: np.ndarray, special: set[int]) -> list[tuple[int, ...]]:
    """Runs of ordinary tokens, in order."""
    found: list[list[int]] = [[]]
    for token in rows.reshape(-1).tolist():
        if token in special:
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(each) for each in found if each]


def settings_of(
    tiny_tokenizer: Path, out: Path, parallel: Path | None, text: Path | None = None, **more: Any
) -> ShardText:
    basis: dict[str, Any] = {"sequence_length": 64, "validation_fraction": 0.2, "workers": 1}
    return ShardText(text, tiny_tokenizer, out, parallel=parallel, **basis | more)


def test_every_pair_is_whole_in_one_row(parallel_text: Path, tiny_tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = shard_text(settings_of(tiny_tokenizer, out, parallel_text))
    dataset, tokenizer = ShardDataset.open(out), load_tokenizer(tiny_tokenizer)
    assert dataset.languages == [] and dataset.pairs == ["el+en", "en+tr"] and not manifest["languages"]
    held: dict[str, set[tuple[int, ...]]] = {}
    for name, (pair, text) in zip(dataset.pairs, find_pairs(parallel_text).items(), strict=True):
        entry = manifest["pairs"][name]
        sides = [
            tuple(tuple(ids.tolist()) for ids in tokenizer.encode_batch([*pair])) for pair in PairReader(text, pair)
        ]
        short = [each for each in sides if len(each[0]) + len(each[1]) + 4 <= 64]
        assert entry["skipped"].get("pair_too_long", 0) == len(sides) - len(short)
        found = []
        for split in ("train", "validation"):
            rows = dataset.rows(split, name)
            assert len(rows) and (rows[:, 0] == tokenizer.bos_id).all()
            for one in rows:
                runs = sentences(one, {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id})
                found += list(zip(runs[::2], runs[1::2], strict=True))
                if split == "validation":
                    held.setdefault(name, set()).add(runs[pair.index("en")])
        assert sorted(found) == sorted(short)
        counted = [entry[split] for split in ("train", "validation")]
        assert sum(count["documents"] for count in counted) == len(short)
        assert sum(count["tokens"] for count in counted) == sum(len(a) + len(b) for a, b in short)
    assert "el+en" in corpus_table(out) and "pairs" in corpus_table(out)


def test_pairs_join_languages_and_leave_their_shards_alone(
    parallel_text: Path, tiny_text: Path, tiny_shards: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """By one command, or added later; killed in between, the languages stay usable and the rest is made."""
    one, two = tmp_path / "one", tmp_path / "two"
    together = shard_text(settings_of(tiny_tokenizer, one, parallel_text, tiny_text, validation_fraction=0.1))
    before = shard_text(settings_of(tiny_tokenizer, two, None, tiny_text, validation_fraction=0.1))
    assert before == ShardDataset.open(tiny_shards).manifest and "pairs" not in before
    assert together["languages"] == before["languages"] and together["fingerprint"] != before["fingerprint"]

    real, made = pipeline.shard_pair, []

    def stop_at_second(making: Any, pair: Any) -> None:
        made.append(making.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        real(making, pair)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(pipeline, "shard_pair", stop_at_second)
        shard_text(settings_of(tiny_tokenizer, two, parallel_text, validation_fraction=0.1))
    assert ShardDataset.open(two).fingerprint == before["fingerprint"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "shard_pair", lambda making, pair: (made.append(making.name), real(making, pair)))
        added = shard_text(settings_of(tiny_tokenizer, two, parallel_text, validation_fraction=0.1))
    assert added == together and made == ["el+en", "en+tr", "en+tr"]
    for name in (MANIFEST, "en+tr/train-00000.arrow"):
        assert filecmp.cmp(one / name, two / name, shallow=False)
    (two / MANIFEST).unlink()
    with pytest.raises(UserError, match="but no manifest"):
        shard_text(settings_of(tiny_tokenizer, two, parallel_text, validation_fraction=0.1))
    assert "pairs" not in shard_text(settings_of(tiny_tokenizer, two, None, tiny_text, validation_fraction=0.1))


def test_a_pair_that_fits_no_row_is_told_and_not_in_the_manifest(
    tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    folder = write_pairs(tmp_path / "p", "en-sw.jsonl", [row(en="the river " * 50, sw="mto")] * 3)
    with pytest.raises(UserError, match="no readable pair"):
        shard_text(settings_of(tiny_tokenizer, tmp_path / "out", folder))
    assert not (tmp_path / "out" / MANIFEST).exists()
    write_pairs(folder, "el-en.jsonl", [row(en=f"river {number}", el="το σπίτι") for number in range(9)])
    for _ in range(2):  # made, and found as it was made
        caplog.clear()
        manifest = shard_text(settings_of(tiny_tokenizer, tmp_path / "out", folder))
        assert list(manifest["pairs"]) == ["el+en"] and ShardDataset.open(tmp_path / "out").pairs == ["el+en"]
        assert "warning: no pair of en+sw fits a row: 3 are longer than --sequence-length" in caplog.messages
        assert "0 languages and 1 pair of languages" in caplog.messages[-1]
        assert not any("earlier run" in message for message in caplog.messages)
    with pytest.raises(UserError, match=r"no pair of en\+sw fits a row"):
        shard_text(settings_of(tiny_tokenizer, tmp_path / "out", folder, strict=True))


def test_a_run_that_made_no_row_does_not_bind_the_next(tiny_tokenizer: Path, tiny_bpe: Path, tmp_path: Path) -> None:
    """Other settings, another tokenizer and other text are taken, as in a folder that is not there."""
    folder = write_pairs(tmp_path / "p", "en-sw.jsonl", [row(en="the river " * 30, sw="mto wa zamani")] * 3)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no readable pair"):
        shard_text(settings_of(tiny_tokenizer, out, folder))
    manifest = shard_text(settings_of(tiny_bpe, out, folder, sequence_length=512))
    assert list(manifest["pairs"]) == ["en+sw"] and manifest["sequence_length"] == 512
    assert load_tokenizer(out / "tokenizer").fingerprint == load_tokenizer(tiny_bpe).fingerprint
    with pytest.raises(UserError, match="sequence_length is 512, this run has 64"):
        shard_text(settings_of(tiny_bpe, out, folder))

    text = write_pairs(tmp_path / "t", "en.jsonl", [row(en="a house", sw="nyumba")])
    with pytest.raises(UserError, match=r"only translation; these are pairs of sentences: give .* as --parallel"):
        shard_text(settings_of(tiny_tokenizer, tmp_path / "other", None, text))
    added = shard_text(settings_of(tiny_tokenizer, tmp_path / "other", folder, sequence_length=512))
    assert list(added["pairs"]) == ["en+sw"]


def test_nothing_asked_for_and_nothing_found(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--parallel FOLDER: one of them"):
        shard_text(settings_of(tiny_tokenizer, tmp_path / "out", None))
    folder = write_pairs(tmp_path / "p", "en-sw.jsonl", [row(de="eins", fr="un")])
    with pytest.raises(UserError, match="no readable pair"):
        shard_text(settings_of(tiny_tokenizer, tmp_path / "out", folder))
    with pytest.raises(UserError, match="lies in the input folder"):
        shard_text(settings_of(tiny_tokenizer, folder / "out", folder))
