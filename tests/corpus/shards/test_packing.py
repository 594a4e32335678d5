"""Packing: every token once and in order, whatever the lengths and the batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.corpus.shards.packing import Packer, Packing

BOS, PAD, EOS = 0, 1, 2
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths, st.integers(3, 17), st.integers(1, 5))
def test_rows_hold_the_stream(sizes: list[int], sequence_length: int, at_once: int) -> None:
    numbers = iter(range(10, 10_000))
    documents = [np.array([next(numbers) for _ in range(size)], dtype=np.int32) for size in sizes]
    packer = Packer(Packing(sequence_length, BOS, EOS, PAD))
    rows = [packer.add(documents[first : first + at_once]) for first in range(0, len(documents), at_once)]
    rows_NT = np.concatenate([*rows, packer.finish()])

    assert rows_NT.dtype == np.int32 and rows_NT.shape[1] == sequence_length
    assert (rows_NT[:, 0] == BOS).all()
    assert (rows_NT[:-1, -1] == EOS).all() and (rows_NT[:-1] != PAD).all()  # only the last row is short
    stream = []
    for row in rows_NT.tolist():
        body = row[1:]
        while body[-1] == PAD:
            body.pop()
        assert body.pop() == EOS
        stream += body
    expected = [token for document in documents for token in (*document.tolist(), EOS)][:-1]
    assert stream == expected


def test_an_exact_fit_leaves_no_padded_row() -> None:
    packer = Packer(Packing(6, BOS, EOS, PAD))
    rows = packer.add([np.array([5, 6, 7, 8])])
    assert rows.tolist() == [[BOS, 5, 6, 7, 8, EOS]]
    assert packer.finish().shape == (0, 6)
