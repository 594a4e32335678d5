"""One text in every form and compression gives the same tokens; what cannot be read is named with a remedy."""

import bz2
import codecs
import functools
import gzip
import io
import json
import lzma
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.common import compression
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text import file_content
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT, TextLayout
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.sources import TextFile
from ksub_ds.corpus.text.tables import table_rows
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".bz2": bz2.compress,
}
KINDS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()))
VIEWS = (pa.string_view(), pa.binary_view())
ONE_A_LINE = TextLayout(line_documents=True)


def as_lines(texts: list[str], key: str = "text", **options: Any) -> str:
    return "".join(json.dumps({"n": n, key: text}, **options) + "\n" for n, text in enumerate(texts))


def rows(texts: list[str], kind: pa.DataType, column: str = "text") -> pa.Table:
    values: list[Any] = [text.encode() for text in texts] if kind in (pa.binary(), pa.large_binary()) else list(texts)
    array = pa.array(texts).cast(kind) if kind in VIEWS else pa.array(values, type=kind)
    return pa.table({"n": range(len(texts)), column: array})


def parquet_bytes(table: pa.Table) -> bytes:
    pq.write_table(table, stream := io.BytesIO(), row_group_size=7)
    return stream.getvalue()


def arrow_bytes(table: pa.Table, writer: Any = pa.ipc.new_stream, codec: str | None = None) -> bytes:
    with writer(stream := io.BytesIO(), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as out:
        out.write_table(table, max_chunksize=20)
    return stream.getvalue()


def forms(texts: list[str]) -> Iterator[tuple[str, bytes, TextLayout]]:
    """Every form without compression: suffix, content, layout."""
    objects = [{"n": n, "text": text} for n, text in enumerate(texts)]
    lines = as_lines(texts, ensure_ascii=False)
    for suffix, content in (
        (".jsonl", as_lines(texts)),
        (".jsonl", lines),
        (".json", lines.replace("\n", "\r\n\n")),
        (".jsonl", as_lines(texts, "raw_content")),
        (".json", json.dumps(objects)),
        (".jsonl", json.dumps(objects, indent=2, ensure_ascii=False)),
        (".json", "\n".join(json.dumps(each, indent=4) for each in objects)),
        (".txt", "\n\n".join(texts)),
        (".txt", "\n \r\n".join(texts) + "\n"),
    ):
        yield suffix, content.encode(), DEFAULT_LAYOUT
        yield suffix, content.encode("utf-8-sig"), DEFAULT_LAYOUT
        yield suffix, codecs.BOM_UTF16_LE + content.encode("utf-16-le"), DEFAULT_LAYOUT
        yield suffix, codecs.BOM_UTF16_BE + content.encode("utf-16-be"), DEFAULT_LAYOUT
    yield ".jsonl", as_lines(texts, "my text").encode(), TextLayout("my text")
    yield ".txt", "\r\n".join(texts).encode(), ONE_A_LINE
    yield ".txt", "\n\n".join(texts).encode(), ONE_A_LINE


def tables(texts: list[str]) -> Iterator[tuple[str, bytes, TextLayout]]:
    """Every form of a table: suffix, content, layout."""
    for kind in KINDS:
        yield ".parquet", parquet_bytes(rows(texts, kind)), DEFAULT_LAYOUT
    for kind in (*KINDS, *VIEWS):
        for writer in (pa.ipc.new_stream, pa.ipc.new_file):
            yield ".arrow", arrow_bytes(rows(texts, kind), writer), DEFAULT_LAYOUT
    for codec in ("lz4", "zstd"):
        yield ".arrow", arrow_bytes(rows(texts, pa.string()), pa.ipc.new_file, codec), DEFAULT_LAYOUT
    yield ".parquet", parquet_bytes(rows(texts, pa.string(), "Text")), TextLayout("Text")
    yield ".arrow", arrow_bytes(rows(texts, pa.binary(), "body")), TextLayout("body")


def read(path: Path, content: bytes, layout: TextLayout = DEFAULT_LAYOUT) -> tuple[list[str], Skipped]:
    path.write_bytes(content)
    return read_as(path.name, path, layout)


def read_as(name: str, path: Path, layout: TextLayout) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    texts = list(DocumentReader([TextFile(path, name)], skipped, layout))
    del skipped.counts["file_without_document"]  # beside other reasons, where these leave nothing of a file
    return texts, skipped


documents = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=40).map(
        "a{}z".format  # neither blank nor beginning with a mark
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=3, deadline=None)
@given(texts=documents)
def test_every_form_and_compression_gives_the_same_tokens(tiny_tokenizer: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)

    @functools.cache
    def tokens(*found: str) -> list[list[int]]:
        return [ids.tolist() for ids in tokenizer.encode_batch(list(found))]

    def check(names: list[str], content: bytes, layout: TextLayout) -> None:
        path.write_bytes(content)
        for name in names:
            found, skipped = read_as(name, path, layout)
            assert tokens(*found) == tokens(*texts), (name, content[:200])
            assert not skipped.counts

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "content")
        for form, content, layout in forms(texts):
            for suffix, compress in COMPRESS.items():
                # In capital letters too, and compressed where its name does not say so.
                names = ["en" + form + suffix, "en" + form.upper() + suffix.upper(), "en" + form]
                check(names, compress(content), layout)
            check(["en" + form + ".gz"], content, layout)  # and the reverse
        for form, content, layout in tables(texts):
            check(["en" + form, "EN" + form.upper(), "en.jsonl", "en.txt", "en.parquet.gz"], content, layout)


GOOD = '{"text": "a small river"}\n'
CONTENT = 'line 1: no "text" or "raw_content", only content, id; give --text-column content'
PARQUET = parquet_bytes(rows(["a"], pa.string(), "body"))
FRENCH = ("Le café est fermé, à côté de l'hôtel. " * 3).strip()


@pytest.mark.parametrize(
    ("name", "content", "counts", "evidence"),
    [
        ("a.jsonl", '{"content": "river", "id": 3}\n', {"no_text_key": 1}, CONTENT),
        ("a.jsonl", '{"id": "", "Text": "", "url": "https://"}', {"no_text_key": 1}, "give --text-column Text"),
        ("a.jsonl", '{"id": "x", "my text": "a longer one"}', {"no_text_key": 1}, "--text-column 'my text'"),
        ("a.jsonl", '{"text": 7}', {"no_text_key": 1}, '"text" holds a JSON number, not a string'),
        ("a.jsonl", '{"\\u001b[31m": 7}', {"no_text_key": 1}, "only \\x1b[31m"),
        ("a.jsonl", '["a", "b"]\n' + GOOD, {"no_text_key": 1}, "a JSON array, not an object"),
        ("a.jsonl", "text\nriver\n", {"bad_json": 2}, 'line 1: not a JSON object of one line: "text"'),
        ("a.json", '[{"text": "a"},\n{"text": "b"', {"damaged_json": 1}, "cut short, after 1 values"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}\n', {"damaged_json": 1}, "array is not closed after 2 values"),
        ("a.json", '[{"body": "a"}, {"text": "b"}]', {"no_text_key": 1}, "give --text-column body"),
        ("a.json", '{\n "data": [{"text": "a"}]\n}', {"no_text_key": 1}, "only data"),
        ("a.jsonl", f'{{"text": "{FRENCH}"}}\n'.encode("latin-1"), {"not_utf8": 1}, "Latin-1 (Windows-1252) it reads"),
        ("a.txt", FRENCH.encode("latin-1"), {"not_utf8": 1}, "iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.txt", "Широка река, и мост её стар".encode("koi8-r"), {"not_utf8": 1}, "find its encoding"),
        ("a.txt", "a small river".encode("utf-16-be"), {"nul_character": 1}, "order mark: iconv -f UTF-16BE"),
        ("a.jsonl", GOOD.strip().encode("utf-16-le"), {"bad_json": 1}, "iconv -f UTF-16LE"),
        ("a.txt", codecs.BOM_UTF16_LE + "ab\n\n".encode("utf-16-le") + b"a", {"not_utf8": 1}, "FF is not UTF-8"),
        ("a.txt", "\ufeffriver".encode("utf-32-le"), {"not_utf8": 1}, "UTF-32"),
        ("a.jsonl.xz", b"\0\1\2river", {"damaged_xz": 1}, "holds no xz data"),
        ("a.jsonl.zst", COMPRESS[".zst"](GOOD.encode() * 99)[:-9], {"damaged_zstd": 1}, "damaged zstd"),
        ("a.jsonl.bz2", bz2.compress(GOOD.encode() * 99)[:-9], {"damaged_bzip2": 1}, "damaged bzip2"),
        ("a.parquet.gz", gzip.compress(PARQUET), {"compressed_table": 1}, "decompress it"),
        ("a.parquet", PARQUET, {"no_text_column": 1}, "only n, body; give --text-column body"),
        ("a.arrow", arrow_bytes(pa.table({"text": [["a"]]})), {"no_text_column": 1}, 'column "text" holds list<'),
        ("a.arrow", b"", {"damaged_arrow": 1}, "a.arrow: "),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", {"damaged_parquet": 1}, "git lfs pull"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", {"not_the_file": 1}, "git lfs pull"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, counts: dict[str, int], evidence: str
) -> None:
    _, skipped = read(tmp_path / name, content.encode() if isinstance(content, str) else content)
    assert skipped.counts == counts
    (line,) = skipped.lines()
    assert evidence in line and name in line and line.isprintable()


def test_the_iconv_line_works_and_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "$(touch oops) it's; en.txt"
    for name, pack in ((path, bytes), (path.with_suffix(".txt.gz"), gzip.compress)):
        _, skipped = read(name, pack(FRENCH.encode("latin-1")))
        command = skipped.lines()[0].split("if so: ")[1].removesuffix(")")
        subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
        assert shlex.split(command)[-1] == f"{name}.utf8"
        assert Path(f"{name}.utf8").read_text() == FRENCH
    assert not (tmp_path / "oops").exists()


def test_good_lines_around_bad_ones_are_read(tmp_path: Path) -> None:
    """Marks of UTF-16 before UTF-8, an array among lines and the like change nothing in how lines are read."""
    for start, bad in ((b"\xff\xfe", "not_utf8"), (b"[INFO]\n", "bad_json"), (b'[{"text": 1}]\n', "no_text_key")):
        texts, skipped = read(tmp_path / "a.jsonl", start + GOOD.encode() * 2)
        assert texts == ["a small river"] * (1 if bad == "not_utf8" else 2) and skipped.counts == {bad: 1}


@pytest.mark.parametrize("name", ["en.parquet", "en.arrow"])
def test_a_string_that_is_not_utf8_costs_its_row_alone(tmp_path: Path, name: str) -> None:
    texts = [f"row {number} of the river".encode() for number in range(60)]
    texts[20] = b"caf\xe9 at the river"
    strings = pa.array(texts, type=pa.binary()).view(pa.string())
    sides = pa.StructArray.from_arrays([strings], names=["en"])
    table = pa.table({"n": range(60), "text": strings, "translation": sides})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
    skipped = Skipped()
    source = TextFile(tmp_path / name, name)
    assert len(list(DocumentReader([source], skipped))) == 59
    assert skipped.counts == {"not_utf8": 1} and "iconv" not in skipped.examples["not_utf8"]
    with open(source.path, "rb") as raw:
        file = file_content.FileContent(raw, source.path, name, skipped)
        pairs = list(table_rows(raw, source.path, file, lambda schema: ["translation"]))
    assert len(pairs) == 59 and pairs[0] == {"translation": {"en": "row 0 of the river"}}


def test_all_that_comes_before_damage_is_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(0, 10**6, 30))) for _ in range(2000)]
    for name, content in (
        ("lines.jsonl.gz", as_lines(texts)),
        ("array.json.gz", json.dumps([{"text": text} for text in texts])),
    ):
        packed = gzip.compress(content.encode())
        (tmp_path / name).write_bytes(packed[: len(packed) * 9 // 10])
        skipped = Skipped()
        found = list(DocumentReader([TextFile(tmp_path / name, name)], skipped))
        assert 1700 < len(found) < 2000 and found == texts[: len(found)], name
        assert "damaged_gzip" in skipped.counts


def test_a_long_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} " + "река " * 500 for number in range(1500)]
    content = json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode()
    assert len(content) > 5 * file_content.PIECE
    found, skipped = read(tmp_path / "a.json", content)
    assert found == texts and not skipped.counts
    monkeypatch.setattr(file_content, "LONGEST_LINE", 1_000_000)
    found, skipped = read(tmp_path / "a.json", b'[{"text": "a"}, {"text": "' + b"x" * 9_000_000 + b'"}]')
    assert found == ["a"] and skipped.counts == {"too_long": 1}
    monkeypatch.setattr(compression, "INFLATION_FREE", 1_000_000)
    packed = gzip.compress(b'[{"text": "a"},' + b" " * 30_000_000)
    _, skipped = read(tmp_path / "a.json", packed)
    assert skipped.counts["inflates_too_much"] == 1


def test_a_text_without_blank_lines_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(get_logger(), "info", messages.append)
    monkeypatch.setattr(get_logger(), "warning", messages.append)
    lines = "".join(f"line {number} of a river" + " and more" * 300 + "\n" for number in range(40)).encode()
    one, _ = read(tmp_path / "a.txt", lines)
    assert len(one) == 1
    (message,) = messages
    assert message.startswith("warning: a.txt: its 40 lines") and message.endswith("give --line-documents")
    many, _ = read(tmp_path / "a.txt", lines, ONE_A_LINE)
    assert len(many) == 40 and many[1].startswith("line 1 of") and len(messages) == 1
    _, skipped = read(tmp_path / "b.txt", b"a river and more\n" * 700_000)  # 12 MB: beyond a document
    assert skipped.counts == {"too_long": 1} and "give --line-documents" in skipped.lines()[0]


@functools.cache
def samples() -> list[tuple[str, bytes]]:
    texts = ["a river", "two"]
    return [(suffix, content) for suffix, content, _ in (*forms(texts), *tables(texts))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_under_any_name_end_a_run(data: st.DataObject) -> None:
    """Damage of every form is counted and never raised; what comes out is text."""
    suffix, whole = data.draw(st.sampled_from(samples()))
    content = bytearray(COMPRESS[data.draw(st.sampled_from(list(COMPRESS)))](whole))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    name = "en" + data.draw(st.sampled_from([suffix, ".jsonl", ".txt", ".parquet", ".arrow"]))
    name += data.draw(st.sampled_from(list(COMPRESS)))
    with tempfile.TemporaryDirectory() as folder:
        texts, skipped = read(Path(folder, name), bytes(content[:cut]))
    assert texts or skipped.total()
    assert all("\0" not in text and text.encode() for text in texts)
    assert all(line.isprintable() for line in skipped.lines())


def test_arrow_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "INFLATION_FREE", 100_000)
    monkeypatch.setattr(compression, "INFLATION_LIMIT", 20)
    packed = arrow_bytes(pa.table({"n": [1] * 20, "text": ["a" * 500_000] * 20}), pa.ipc.new_file, "zstd")
    texts, skipped = read(tmp_path / "a.arrow", packed)
    assert texts == [] and skipped.counts == {"inflates_too_much": 1}
    lie = bytearray(arrow_bytes(rows(["a river " * 99], pa.string()), codec="zstd"))
    at = lie.rfind(struct.pack("<q", 8 * 99))  # what a compressed buffer says that it holds
    lie[at : at + 8] = struct.pack("<q", 1 << 40)
    assert read(tmp_path / "a.arrow", bytes(lie))[1].counts == {"inflates_too_much": 1}
    repeated = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int8), ["a" * 10_000])
    _, skipped = read(tmp_path / "a.arrow", arrow_bytes(pa.table({"text": repeated})))
    assert skipped.counts == {"inflates_too_much": 1}


def test_options_are_part_of_the_recipe_only_when_they_are_given(tmp_path: Path, tiny_tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/en.jsonl").write_text('{"text": "a small river", "Body": "a stone and a bird"}\n' * 9)
    (tmp_path / "in/tr.txt").write_text("kus\nve tas\n")
    plain = ShardText(tmp_path / "in", tiny_tokenizer, tmp_path / "out", 64, 0.0, 1)
    first = shard_text(plain)
    part = json.loads((tmp_path / "out/en/part.json").read_text())
    assert list(part["recipe"]) == ["validation_fraction", "text"]
    plain.text_column, plain.line_documents = "Body", True
    second = shard_text(plain)
    part = json.loads((tmp_path / "out/en/part.json").read_text())
    assert part["recipe"]["text_column"] == "Body" and part["recipe"]["line_documents"] is True
    tokens = [result["languages"]["en"]["train"]["tokens"] for result in (first, second)]
    assert tokens[0] != tokens[1] and second["languages"]["tr"]["train"]["documents"] == 2
    plain.text_column = ""
    with pytest.raises(UserError, match="--text-column ''"):
        shard_text(plain)
