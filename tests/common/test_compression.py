"""Compressed files are known by their content, and damage is one kind of error."""

import bz2
import gzip
import io
import lzma

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.compression import DamagedFileError, compression_of, decompressed

COMPRESS = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
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
