"""Shards: opened by `datasets` as they are, memory-mapped, and every kind of damage is reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.shards import writer as shard_writer
from ksub_ds.corpus.shards.dataset import ShardDataset, dataset_fingerprint
from ksub_ds.corpus.shards.writer import ShardWriter


@pytest.fixture()
def copy(tiny_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_shards, tmp_path / "shards")


def change_manifest(folder: Path, change: Any, refresh: bool = True) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if refresh:
        manifest["fingerprint"] = dataset_fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_datasets_opens_a_shard_as_it_is(tiny_shards: Path) -> None:
    from datasets import Dataset

    path = tiny_shards / "en" / "train-00000.arrow"
    rows = ShardDataset.open(tiny_shards).rows("train", "en")
    theirs = Dataset.from_file(str(path))
    assert theirs.column_names == ["input_ids"] and len(theirs) == len(rows)
    assert theirs.with_format("numpy")[:]["input_ids"].tolist() == rows.tolist()


def test_rows_are_views_of_the_memory_map(tiny_shards: Path) -> None:
    dataset = ShardDataset.open(tiny_shards)
    rows = dataset.rows("train", "en")
    assert rows.dtype == np.int32 and rows.shape == (dataset.num_sequences("train", "en"), 64)
    assert not rows.flags.owndata and not rows.flags.writeable


def test_gather_counts_over_files_and_languages(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "ROWS_PER_FILE", 10)  # many files
    folder = shutil.copytree(tiny_shards, tmp_path / "many")
    expected, numbers = [], iter(range(10**6))
    languages = {}
    for language, count in (("de", 25), ("sw", 10), ("xx", 1)):
        writer = ShardWriter(folder / language, language, "train", 64)
        rows = np.array([[next(numbers)] * 64 for _ in range(count)], dtype=np.int32)
        for part in np.array_split(rows, 4):
            writer.write(part)
        writer.close()
        assert [file["sequences"] for file in writer.files] == [10] * (count // 10) + (
            [count % 10] if count % 10 else []
        )
        languages[language] = {"files": writer.files}
        expected.append(rows)
    change_manifest(folder, lambda manifest: manifest.update(languages=languages))
    dataset = ShardDataset.open(folder)
    everything = np.concatenate(expected)
    order = np.random.default_rng(0).permutation(36)
    assert (dataset.gather("train", order) == everything[order]).all()
    assert (dataset.gather("train", np.array([24, 3]), "de") == expected[0][[24, 3]]).all()
    assert (dataset.rows("train", "de") == expected[0]).all()
    assert dataset.rows("validation", "de").shape == (0, 64) and dataset.num_sequences("validation", "de") == 0


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "damaged"),
        (lambda path: path.write_bytes(b"\xff" * 3000), "damaged"),
    ],
)
def test_damage_is_named(copy: Path, damage: Any, fault: str, verify: bool) -> None:
    damage(copy / "el" / "train-00000.arrow")
    with pytest.raises(UserError, match=f"el/train-00000.arrow: .*{fault}"):
        ShardDataset.open(copy, verify=verify)


def test_one_flipped_byte_is_found(copy: Path) -> None:
    path = copy / "tr" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="sha256"):
        ShardDataset.open(copy)


@pytest.mark.parametrize(
    "path",
    ["../en/train-00000.arrow", "/etc/passwd", "en/../../x/train-00000.arrow", "el/train-00000.arrow", "en/x.arrow"],
)
def test_paths_that_leave_their_place_are_refused(copy: Path, path: str) -> None:
    change_manifest(copy, lambda manifest: manifest["languages"]["en"]["files"][0].update(path=path))
    with pytest.raises(UserError, match=r"manifest\.json: path"):
        ShardDataset.open(copy)


@pytest.mark.parametrize("language", ["EN", "..", "e", "en/x", "engl", ""])
def test_strange_language_codes_are_refused(copy: Path, language: str) -> None:
    def rename(manifest: Any) -> None:
        entry = manifest["languages"].pop("en")
        entry["files"][0]["path"] = f"{language}/train-00000.arrow"
        manifest["languages"][language] = entry

    change_manifest(copy, rename)
    with pytest.raises(UserError, match=r"manifest\.json: path"):
        ShardDataset.open(copy)


def test_manifest_mistakes(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        ShardDataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no manifest"):
        ShardDataset.open(tmp_path)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not a manifest of token shards"):
        ShardDataset.open(tmp_path / "list")
    change_manifest(copy, lambda manifest: manifest["languages"]["en"]["files"][0].update(sequences=1), refresh=False)
    with pytest.raises(UserError, match="fingerprint"):
        ShardDataset.open(copy)
    change_manifest(copy, lambda manifest: None)
    with pytest.raises(UserError, match="the manifest says 1"):
        ShardDataset.open(copy)
    change_manifest(copy, lambda manifest: manifest.update(format=99))
    with pytest.raises(UserError, match="format is 99"):
        ShardDataset.open(copy)
    (copy / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="lacks 'languages'"):
        ShardDataset.open(copy)
    (copy / "manifest.json").write_text("[1")
    with pytest.raises(UserError, match="not valid JSON"):
        ShardDataset.open(copy)


def test_another_tokenizer_is_refused(tiny_shards: Path) -> None:
    dataset = ShardDataset.open(tiny_shards)
    dataset.check_tokenizer(dataset.manifest["tokenizer"]["fingerprint"], "itself")
    with pytest.raises(UserError, match="tokenizer fingerprint"):
        dataset.check_tokenizer("0" * 64, "other.model")
