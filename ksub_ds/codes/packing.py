"""Codes in as few bits as their tables need, one after the other in the bytes of a token, lowest bit first.

Half of what an input-only embedding stores are codes: of tables of 32 rows they take 5 bits, not 8.
"""

import numpy as np

from ksub_ds.codes.blocks import BLOCK_ROWS

MOST_BITS = 8


def code_bits(largest_table: int) -> int:
    """Return the bits of a code of a table of so many rows: 1 to 8, or 32 beyond 256 rows, which are not packed."""
    bits = max(1, (largest_table - 1).bit_length())
    return bits if bits <= MOST_BITS else 32


def packed_bytes(num_tables: int, bits: int) -> int:
    """Return the bytes of a token's codes."""
    return -(-num_tables * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack (N, K) codes below 2^bits, bits <= 8, into (N, packed_bytes) uint8."""
    packed = np.empty((len(codes), packed_bytes(codes.shape[1], bits)), np.uint8)
    for first in range(0, len(codes), BLOCK_ROWS):
        block = codes[first : first + BLOCK_ROWS].astype(np.uint8)
        single = np.unpackbits(block[..., None], axis=-1, count=bits, bitorder="little")
        packed[first : first + BLOCK_ROWS] = np.packbits(single.reshape(len(block), -1), axis=1, bitorder="little")
    return packed


def unpack(packed: np.ndarray, num_tables: int, bits: int) -> np.ndarray:
    """Return the (N, K) int32 codes that `pack` got.

    Args:
        packed: (N, packed_bytes) uint8.
        num_tables: K.
        bits: of each code, at most 8.

    Raises:
        ValueError: another type or width, or bits are set behind the last code, which `pack` leaves free: these are
            other numbers.
    """
    width = packed_bytes(num_tables, bits)
    spare = 8 * width - num_tables * bits
    is_packed = packed.dtype == np.uint8 and packed.shape[1:] == (width,)
    if not is_packed or (spare and (packed[:, -1] >> (8 - spare)).any()):
        raise ValueError(f"codes of {num_tables} tables are not packed as {bits}-bit numbers")
    codes = np.empty((len(packed), num_tables), np.int32)
    place = np.arange(bits, dtype=np.uint8)
    for first in range(0, len(packed), BLOCK_ROWS):
        single = np.unpackbits(packed[first : first + BLOCK_ROWS], axis=1, count=num_tables * bits, bitorder="little")
        shifted = single.reshape(-1, num_tables, bits) << place
        codes[first : first + BLOCK_ROWS] = shifted.sum(axis=-1, dtype=np.int32)
    return codes
