"""Packed codes: back again, in no more bytes than their bits need, bit for bit as FAISS packs them."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.codes.packing import code_bits, pack, packed_bytes, unpack


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_packed_codes_come_back_and_are_packed_as_by_faiss(bits, num_tables, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (count, num_tables), dtype=np.int32)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (count, packed_bytes(num_tables, bits))
    assert (unpack(packed, num_tables, bits) == codes).all()
    assert (faiss.pack_bitstrings(codes, bits) == packed).all()


def test_blocks_are_joined(monkeypatch):
    monkeypatch.setattr("ksub_ds.codes.packing.BLOCK_ROWS", 7)
    codes = np.random.default_rng(0).integers(0, 32, (20, 9))
    assert (unpack(pack(codes, 5), 9, 5) == codes).all()


def test_codes_of_a_byte_each_are_told_from_packed_ones_of_as_many_bytes():
    """Four codes of 7 bits take four bytes, as they do unpacked."""
    with pytest.raises(ValueError, match="not packed as 7-bit numbers"):
        unpack(np.full((2, 4), 100, np.uint8), 4, 7)


@pytest.mark.parametrize(("rows", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 32)])
def test_bits_of_a_table(rows, bits):
    assert code_bits(rows) == bits
