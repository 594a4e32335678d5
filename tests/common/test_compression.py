"""Compressed files are known by their content, and damage is one kind of error."""

import bz2
import gzip
import io
import lzma
import tracemalloc
import zlib

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.compression import DamagedFileError, compression_of, decompressed

COMPRESS = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=1),
    "zstd": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("name", COMPRESS)
@given(parts=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=4))
def test_every_form_and_its_concatenations_are_read(name: str, parts: list[bytes]) -> None:
    raw = io.BytesIO(b"".join(map(COMPRESS[name], parts)))
    assert compression_of(raw) == name and raw.tell() == 0
    assert decompressed(raw).read() == b"".join(parts)


def test_plain_content_is_itself() -> None:
    for content in (b"", b"B", b"text\n" * 1000):
        assert decompressed(io.BytesIO(content)).read() == content


@pytest.mark.parametrize("name", COMPRESS)
def test_a_cut_is_damage(name: str) -> None:
    whole = COMPRESS[name](bytes(range(256)) * 40)
    with pytest.raises(DamagedFileError, match=name):
        decompressed(io.BytesIO(whole[: len(whole) // 2])).read()


@pytest.mark.parametrize("name", COMPRESS)
def test_all_before_the_damage_is_read(name: str) -> None:
    lines = b"".join(b"%d a river\n" % number for number in range(50_000))
    whole = COMPRESS[name](lines)
    stream, read = decompressed(io.BytesIO(whole[: len(whole) * 9 // 10])), 0
    with pytest.raises(DamagedFileError, match=name):
        for line in stream:
            assert line == b"%d a river\n" % read
            read += 1
    assert read > 30_000 or name == "bzip2"  # whose blocks are of 900 kB


def test_text_that_begins_like_a_compressed_file_is_text() -> None:
    for content in (b"BZh is no word\n", b"BZh9 is none\n", b"(a\n", b"PK\n"):
        assert compression_of(io.BytesIO(content)) is None
        assert decompressed(io.BytesIO(content)).read() == content


def test_zstd_frames_to_skip_are_skipped() -> None:
    frame, skipped = COMPRESS["zstd"](b"river"), b"\x50\x2a\x4d\x18\x04\0\0\0abcd"  # as pzstd writes it
    assert decompressed(io.BytesIO(skipped + frame + skipped + frame)).read() == b"riverriver"


def test_garbage_after_the_data_is_damage_and_padding_is_not() -> None:
    for name in ("xz", "bzip2", "zstd", "gzip"):
        with pytest.raises(DamagedFileError, match=name):
            decompressed(io.BytesIO(COMPRESS[name](b"river") + b"some garbage")).read()
    assert decompressed(io.BytesIO(lzma.compress(b"a") + b"\0" * 8 + lzma.compress(b"b") + b"\0" * 4)).read() == b"ab"


def test_a_dictionary_or_window_of_gigabytes_is_refused() -> None:
    """Two headers that ask for 1.5 and 2 GiB before the first byte of text."""
    whole = bytearray(lzma.compress(b"river" * 100))
    header = whole[12:24]  # of the block: size, flags, filter, size of its properties, dictionary
    assert header[2:4] == b"\x21\x01"
    header[4] = 37  # 1.5 GiB
    header[8:12] = zlib.crc32(header[:8]).to_bytes(4, "little")
    whole[12:24] = header
    window = b"\x28\xb5\x2f\xfd\0" + bytes([21 << 3]) + b"\x19\0\0abc"
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="more than 256 MiB"):
        decompressed(io.BytesIO(whole)).read()
    with pytest.raises(DamagedFileError, match="more than 128 MiB"):
        decompressed(io.BytesIO(window)).read()
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
