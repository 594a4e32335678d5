"""Packing: every token once and in order, whatever the lengths and the batches."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.corpus.shards.packing import Packer, Packing, PairPacker, frame_pair, pair_positions

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


@given(lengths, st.integers(4, 17), st.sampled_from([BOS, EOS]))
def test_without_a_padding_token_rows_are_filled_with_the_end_token(sizes: list[int], length: int, bos: int) -> None:
    """Padding is what follows the end of the last row; one place after it may as well be a separator before it."""
    documents = [np.arange(10, 10 + size, dtype=np.int32) for size in sizes]
    padded, bare = (Packer(packing) for packing in (Packing(length, bos, EOS, PAD), Packing(length, bos, EOS, None)))
    expected, rows = (np.concatenate([each.add(documents), each.finish()]) for each in (padded, bare))
    assert (rows == np.where(expected == PAD, EOS, expected)).all()
    padding = expected == PAD
    padding[padding.sum(axis=1) == 1] = False
    assert (Packing(length, bos, EOS, None).padding(rows) == padding).all()


def test_an_exact_fit_leaves_no_padded_row() -> None:
    packer = Packer(Packing(6, BOS, EOS, PAD))
    rows = packer.add([np.array([5, 6, 7, 8])])
    assert rows.tolist() == [[BOS, 5, 6, 7, 8, EOS]]
    assert packer.finish().shape == (0, 6)


def test_positions_of_pairs() -> None:
    """A translation starts where its sentence does; the next pair after the longer of both. Counted by hand."""
    packing = Packing(20, BOS, EOS, PAD)
    a, b, c, d = (np.arange(10, 10 + size, dtype=np.int32) for size in (2, 4, 3, 1))
    packer = PairPacker(packing)
    done = packer.add([frame_pair(a, b, packing), frame_pair(c, d, packing)])
    rows = np.concatenate([done, packer.finish()])
    assert rows.tolist() == [[0, 10, 11, 2, 2, 10, 11, 12, 13, 2, 0, 10, 11, 12, 2, 2, 10, 2, 1, 1]]
    expected = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8, -1, -1]
    assert pair_positions(rows, packing).tolist() == [expected]
    same = Packing(20, EOS, EOS, PAD)  # tokenizers with one token for both
    assert pair_positions(np.where(rows == BOS, EOS, rows), same).tolist() == [expected]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=120), st.integers(1, 40))
def test_pairs_stay_whole_and_rows_are_full(sizes: list[tuple[int, int]], at_once: int) -> None:
    packing, numbers = Packing(40, BOS, EOS, PAD), iter(range(10, 10_000))
    pairs = [
        frame_pair(*(np.array([next(numbers) for _ in range(size)], dtype=np.int32) for size in both), packing)
        for both in sizes
    ]
    packer = PairPacker(packing)
    rows = [packer.add(pairs[first : first + at_once]) for first in range(0, len(pairs), at_once)]
    packed = np.concatenate([*rows, packer.finish()])
    assert packed.shape[1] == 40 and packed.dtype == np.int32
    found = []
    for row in packed:
        body = row[row != PAD]
        assert (row[len(body) :] == PAD).all()
        found += [tuple(each.tolist()) for each in np.split(body, np.flatnonzero(body == BOS)[1:])]
    assert sorted(found) == sorted(tuple(pair.tolist()) for pair in pairs)
    least = -(-sum(map(len, pairs)) // 40)
    assert len(packed) <= 2 * least  # best fit wastes less than half
    positions = pair_positions(packed, packing)
    assert ((positions == -1) == (packed == PAD)).all()
    for row, places in zip(packed, positions, strict=True):
        used = [set(places[np.isin(row, pair[pair >= 10])].tolist()) for pair in pairs if pair[1] in row]
        assert sum(map(len, used)) == len(set.union(*used))  # no two pairs share a position
