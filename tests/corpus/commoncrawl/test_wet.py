"""The reader of WET files: good records are returned whatever is around them, bad ones with offset and reason."""

import bz2
import gzip
import importlib.util
import lzma
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.commoncrawl import wet
from ksub_ds.corpus.commoncrawl.wet import Fault, Limits, Other, Page, read_wet

spec = importlib.util.spec_from_file_location("wet_files", Path(__file__).with_name("wet_files.py"))
assert spec is not None and spec.loader is not None
wet_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wet_files)
record, member, wet_file = wet_files.record, wet_files.member, wet_files.wet_file

GOOD = [member(record(number, f"page {number}\nsecond line")) for number in range(4)]
A, B = GOOD[0], GOOD[1]
LF = b"".join(record(number, f"text {number}") for number in range(3)).replace(b"\r\n", b"\n")


def read(path: Path, content: bytes, limits: Limits | None = None) -> tuple[list[str], list[tuple[int, str]]]:
    path.write_bytes(content)
    items = list(read_wet(path, limits))
    pages = [item.url.rpartition("/")[2] for item in items if isinstance(item, Page)]
    return pages, [(item.offset, item.reason) for item in items if isinstance(item, Fault)]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


# ruff: noqa: E501 - one case a line reads better than broken ones
HOSTILE: dict[str, tuple[bytes, list[str], list[tuple[int, str]]]] = {
    "whole": (b"".join(GOOD), ["0", "1", "2", "3"], []),
    "cut in the checksum": (A + B[:-3], ["0"], [(len(A), "cut off by the end of the file")]),
    "cut in the middle": (A + B[:60], ["0"], [(len(A), "cut off by the end of the file")]),
    "flipped bit": (A + flipped(B, 45) + GOOD[2], ["0", "2"], [(len(A), "damaged gzip member")]),
    "flipped bit in the checksum": (A + flipped(B, len(B) - 6) + GOOD[2], ["0", "2"], [(len(A), "incorrect data check")]),
    "flipped bit in the first byte": (A + flipped(B, 0) + GOOD[2], ["0", "2"], [(len(A), "no gzip member")]),
    "zeros between": (A + bytes(70_000) + B + bytes(9), ["0", "1"], [(len(A), "no gzip"), (len(A + B) + 70_000, "no gzip")]),
    "one member": (member(*(record(n, f"text {n}") for n in range(3))), ["0", "1", "2"], []),
    "plain": (b"".join(record(n, f"text {n}") for n in range(3)), ["0", "1", "2"], []),
    "empty": (b"", [], [(0, "the file is empty")]),
    "no gzip": (b"<html>403 Forbidden</html>", [], [(0, "is neither gzip nor WARC")]),
    "gzip of something else": (gzip.compress(b"hello\n" * 50), [], [(0, "no WARC record starts here")]),
    "bomb": (A + member(record(9, b"a" * 30_000_000)) + B, ["0", "1"], [(len(A), "more than the 4,194,304 bytes")]),
    "bomb with a modest length": (A + member(record(9, b"a" * 30_000_000, length=5)) + B, ["0", "1"], [(len(A), "goes on")]),
    "a million headers": (A + member(record(9, "x", extra="X: y\r\n" * 1_000_000)) + B, ["0", "1"], [(len(A), "header of more")]),
    "many headers": (A + member(record(9, "x", extra="X: y\r\n" * 300)) + B, ["0", "1"], [(len(A), "header of 307 lines")]),
    "length too large": (A + member(record(9, "text", length=50)) + B, ["0", "1"], [(len(A), "only 8 bytes follow")]),
    "length too small": (A + member(record(9, "x" * 100, length=50)) + B, ["0", "1"], [(len(A), "the record goes on")]),
    "length negative": (A + member(record(9, "text", length=-4)) + B, ["0", "1"], [(len(A), "is not a number")]),
    "length absent": (A + member(b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nx\r\n\r\n") + B, ["0", "1"], [(len(A), "has no Content")]),
    "length twice": (A + member(record(9, "text", extra="Content-Length: 3\r\n")) + B, ["0", "1"], [(len(A), "two different")]),
    "length astronomic": (A + member(record(9, "text", length=10**17)) + B, ["0", "1"], [(len(A), "more than the 4,194,304")]),
    "wrong length inside one member": (
        member(record(1, "a"), record(9, "x", length=60), record(2, "b")), ["1", "2"], [(0, "the record goes on")]),
    "latin-1": (A + member(record(9, "café".encode("latin-1"))) + B, ["0", "1"], [(len(A), "not UTF-8 at byte 3")]),
    "half a surrogate pair": (A + member(record(9, b"a\xed\xa0\x80")) + B, ["0", "1"], [(len(A), "surrogate")]),
    "NUL": (A + member(record(9, "a\0b")) + B, ["0", "1"], [(len(A), "NUL character")]),
    "the same record twice": (A + A + B, ["0", "1"], [(len(A), "duplicate WARC-Record-ID")]),
    "no newline at the end": (A + member(record(9, "last line", end=b"")), ["0", "9"], []),
    "LF for every CRLF": (LF, ["0", "1", "2"], []),
    "LF in one member": (gzip.compress(LF), ["0", "1", "2"], []),
    "LF, a blank line with CRLF inside": (
        record(0, "").replace(b"\r\n", b"\n").replace(b": 0\n", b": 6\n").rstrip() + b"\n\na\r\n\r\nb\n\n" + LF[len(LF) // 3 :], ["0", "1", "2"], []),
    "a byte-order mark": (b"\xef\xbb\xbf" + LF, ["0", "1", "2"], []),
    "a byte-order mark in gzip": (gzip.compress(b"\xef\xbb\xbf" + record(0, "x")) + B, ["0", "1"], []),
    "a byte-order mark in xz": (lzma.compress(b"\xef\xbb\xbf" + record(0, "x")), ["0"], []),
    "one line end between": (b"".join(record(n, f"text {n}", end=b"\r\n") for n in range(3)), ["0", "1", "2"], []),
    "a newline between": (b"".join(record(n, f"text {n}", end=b"\n") for n in range(3)), ["0", "1", "2"], []),
    "nothing between": (b"".join(record(n, f"text {n}", end=b"") for n in range(3)), ["0", "1", "2"], []),
    "one line end in one member": (member(*(record(n, "x", end=b"\r\n") for n in range(3))), ["0", "1", "2"], []),
    "too short, a line end inside": (record(1, "ab\r\ncd", length=2) + record(2, "x"), ["2"], [(0, "the record goes on")]),
    "folded header": (A + member(record(9, "x", extra="X: eng,\r\n deu\r\n\tfra\r\n")) + B, ["0", "9", "1"], []),
    "folded, with a colon": (A + member(record(9, "x", extra="X: a\r\n Content-Length: 7\r\n")) + B, ["0", "9", "1"], []),
    "xz": (lzma.compress(b"".join(record(n, f"text {n}") for n in range(3))), ["0", "1", "2"], []),
    "bzip2, two streams": (bz2.compress(record(0, "a")) + bz2.compress(record(1, "b")), ["0", "1"], []),
    "zstd": (pa.compress(record(0, "a") + record(1, "b"), "zstd", asbytes=True), ["0", "1"], []),
    "xz of something else": (lzma.compress(b"hello" * 9), [], [(0, "no WARC record starts here")]),
    "xz cut off": (lzma.compress(record(0, "a"))[:-20], [], [(0, "damaged xz data")]),
    "no type": (A + member(b"WARC/1.0\r\nContent-Length: 1\r\n\r\nx\r\n\r\n") + B, ["0", "1"], [(len(A), "has no WARC-Type")]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_all_that_can_be_read_is_read(name: str, tmp_path: Path) -> None:
    content, pages, faults = HOSTILE[name]
    found, reasons = read(tmp_path / "file", content)
    assert found == pages
    assert [offset for offset, _ in reasons] == [offset for offset, _ in faults], reasons
    for (_, reason), (_, expected) in zip(reasons, faults, strict=True):
        assert expected in reason


def test_what_a_page_holds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    url = "http://a.example/../../etc/passwd?x=%00"
    path.write_bytes(
        member(record("info", "software", kind="warcinfo"))
        + member(record(7, "\ufeffTitle\r\nline \u2028 two\r\n\r\n", url=url))
        + member(record(8, ""))
    )
    info, page, empty = read_wet(path)
    assert isinstance(info, Other) and info.kind == "warcinfo" and isinstance(page, Page) and isinstance(empty, Page)
    assert page == (page.offset, url, "2019-02-16T07:20:43Z", "sha1:7", "Title\nline \u2028 two")
    assert page.offset == len(member(record("info", "software", kind="warcinfo"))) and empty.text == ""


def test_damage_far_inside_one_member_costs_what_follows_only(tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [draw.randbytes(400).hex() for _ in range(400)]
    content = member(*(record(number, text) for number, text in enumerate(texts)))
    for damaged in (content[:-2000], content[: len(content) // 2] + b"\xff" * 40 + content[len(content) // 2 + 40 :]):
        pages, faults = read(tmp_path / "file", damaged + B)
        assert pages[:150] == [str(number) for number in range(150)]
        assert "1" in pages  # the member after it is found again (or was, as a record of the first)
        assert any("gzip" in reason for _, reason in faults)


def test_a_file_has_a_budget(tmp_path: Path) -> None:
    bombs = b"".join(member(record(number, b"a" * 900_000)) for number in range(20))
    limits = Limits(record=1 << 20, file=5 << 20)
    pages, faults = read(tmp_path / "file", bombs, limits)
    assert len(pages) == 5 and faults[-1][1].startswith("the rest of the file is left: it inflates to more")
    pages, faults = read(tmp_path / "file", bombs, Limits(records=3))
    assert len(pages) == 3 and faults == [(faults[0][0], "the rest of the file is left: 3 records so far")]
    junk = b"".join(member(record(number, "x", length=9)) for number in range(20))
    assert len(read(tmp_path / "file", junk, Limits(faults=4))[1]) == 5
    # In search of the next record no more than `skip` is inflated; then the next member is looked for.
    pages, faults = read(tmp_path / "file", member(record(9, b"a" * 3_000_000)) + B, Limits(record=1000, skip=1 << 20))
    assert pages == ["1"] and "no further record within" in faults[-1][1]


@pytest.mark.parametrize("cut", [1, 4, 8, 9])
def test_no_page_comes_out_before_its_checksum(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the checksum falls on the pieces in which a member is taken."""
    whole = member(record(0, random.Random(0).randbytes(3000).hex()))  # longer than the part searched for the header
    monkeypatch.setattr(wet, "_PIECE", len(whole) - cut)
    assert read(tmp_path / "file", whole + B) == (["0", "1"], [])
    pages, faults = read(tmp_path / "file", flipped(whole, len(whole) - 6) + B)
    assert pages == ["1"] and "incorrect data check" in faults[0][1]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_come_to_an_end_without_an_exception(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(b"".join(GOOD) if data.draw(st.booleans()) else member(*(record(n, "x y") for n in range(9))))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    ):
        content[place] = value
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=30))
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    for item in read_wet(path):
        if isinstance(item, Page):
            item.text.encode()
            assert "\0" not in item.text
        assert 0 <= item.offset <= len(content)


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
def test_other_compressions_have_the_same_limits(compress: Any, tmp_path: Path) -> None:
    """Damage ends them, after the pages before it; what they inflate to is bounded."""
    draw = random.Random(2)
    content = compress(b"".join(record(number, draw.randbytes(4000).hex()) for number in range(400)))
    pages, faults = read(tmp_path / "file", content[: len(content) // 2])
    assert pages[:20] == [str(number) for number in range(20)] and len(pages) < 400
    assert [reason.split(" data")[0].split()[0] for _, reason in faults] == ["damaged"]
    bomb = compress(record(1, b"a" * 30_000_000) + record(2, "x"))
    assert read(tmp_path / "file", bomb, Limits(file=5 << 20))[1][-1][1].startswith("the rest of the file is left")


def test_what_is_no_file_is_a_fault(tmp_path: Path) -> None:
    assert read_wet(tmp_path / "absent").__next__() == Fault(0, "cannot be read: No such file or directory")
    assert next(read_wet(tmp_path)) == Fault(0, "cannot be read: Is a directory")


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A line of 300 MB and many large pages in one member, within 100 MB for the whole process."""
    path = tmp_path / "file"
    packer = zlib.compressobj(1, wbits=31)
    long_line = [packer.compress(record(9, "", length=300 << 20, end=b""))]
    long_line += [packer.compress(bytes([97]) * (1 << 20)) for _ in range(300)]
    with open(path, "wb") as stream:
        stream.write(A + b"".join(long_line) + packer.flush())
        stream.write(gzip.compress(b"".join(record(n, b"b" * (1 << 21)) for n in range(10, 20)), 1))
    code = (
        "import sys; sys.argv[0] = 'ksub'; from pathlib import Path\n"
        "from ksub_ds.corpus.commoncrawl.wet import read_wet\n"
        "print(sum(1 for _ in read_wet(Path(sys.argv[1])))); print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, *status = done.stdout.splitlines()
    peak_kB = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert int(count) == 12 and peak_kB < 100_000


def test_the_sample_is_read_whole(ksub_data: Path) -> None:
    folder = ksub_data / "wet"
    truth = (folder / "truth.jsonl").read_text(encoding="utf-8").count("\n")
    items = [item for path in sorted(folder.glob("*.gz")) for item in read_wet(path)]
    assert sum(isinstance(item, Page) for item in items) == truth == 9030
    assert not [item for item in items if isinstance(item, Fault)]
