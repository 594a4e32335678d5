"""Files of rows in every form and compression hold the same; what is beside, amiss or another encoding is told."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.data.row_files import find_files, read_rows

ROWS = [{"text": 'a "bird", it\nsings', "y": "1"}, {"text": "ein Vögelchen; 'x' ", "y": "2"}]
PLAIN = [row | {"text": row["text"].replace("\n", " ")} for row in ROWS]  # a TSV has no way to write a line's end
COMPRESS: dict[str, Any] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def content(form: str) -> bytes:
    if form == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    stream = io.StringIO(newline="")
    if form == ".tsv":
        stream.write("text\ty\n" + "".join(f"{row['text']}\t{row['y']}\n" for row in PLAIN))
    else:
        writer = csv.DictWriter(stream, ["text", "y"])
        writer.writeheader()
        writer.writerows(ROWS)
    return ("\ufeff" + stream.getvalue()).encode()  # as Excel begins its files


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_form_holds_the_same(tmp_path: Path, form: str, suffix: str) -> None:
    (tmp_path / f"Train{form.upper()}{suffix}").write_bytes(COMPRESS[suffix](content(form)))
    (tmp_path / f".train{form}").write_text("hidden")
    (path,) = find_files(tmp_path, "train")
    assert [row for _, _, row in read_rows(path)] == (PLAIN if form == ".tsv" else ROWS)
    path.write_bytes(COMPRESS[".gz" if suffix != ".gz" else ".xz"](content(form)))  # the content decides
    assert len(list(read_rows(path))) == 2


def test_other_names_shards_and_what_lies_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    (tmp_path / "dev.tsv").write_bytes(content(".tsv"))
    (tmp_path / "dev_matched.csv").write_bytes(content(".csv"))
    assert [path.name for path in find_files(tmp_path, "validation")] == ["dev.tsv"]
    assert [path.name for path in find_files(tmp_path, "validation_matched")] == ["dev_matched.csv"]
    assert find_files(tmp_path, "train") == find_files(tmp_path / "nowhere", "train") == []
    for number in (1, 0):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / f"train-0000{number}-of-00002.parquet")
    assert [path.name[-19:-17] for path in find_files(tmp_path, "train")] == ["00", "01"]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(content(".jsonl")))
    (tmp_path / "train.jsonl").write_bytes(content(".jsonl"))
    assert [path.name for path in find_files(tmp_path, "train")] == ["train.jsonl.gz"]
    assert "train.jsonl.gz: is read; beside it train.jsonl, train-00000-of-00002.parquet" in caplog.text
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "test-00001-of-00002.parquet")
    with pytest.raises(UserError, match="there are 2 shards, but it is alone"):
        find_files(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.jsonl", '{"text": 1}\n'.encode("utf-16"), r"is UTF-16; convert it \(iconv"),
        ("train.jsonl", b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8"),
        ("train.json", b' [{"text": "a"}]', r"line 1 begins a JSON array; write one object a line"),
        ("train.csv", b"a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields, the first line 2 \(a, b\)"),
        ("train.csv", b'a,b\n"1,2\n', "quotes are amiss"),
        ("train.tsv", b"a\ta\n1\t2\n", "two columns have one name"),
        ("train.csv.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 9, "damaged or cut short"),
    ],
)
def test_what_is_amiss_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))
