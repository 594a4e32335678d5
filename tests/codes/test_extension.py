"""New tokens get codes that nobody has, near tokens like them; a full code space is refused with the count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds import CodeTable, clustered_codes, plain_codes, positional_codes
from ksub_ds.codes.extension import count_reserved_rows, extend_codes


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(0, 10), st.integers(0, 2**31))
def test_old_codes_stay_and_new_ones_are_unused(num_tokens, num_tables, count, seed):
    draw = np.random.default_rng(seed)
    table = positional_codes(num_tokens, num_tables)
    table = CodeTable(draw.permutation(table.codes), table.table_sizes)
    reserved = count_reserved_rows(table)
    free = np.prod([size - reserved for size in table.table_sizes]) - num_tokens + reserved
    if count == 0 or count > free:
        with pytest.raises(ValueError, match=f"only {free:,} are unused" if count else "at least 1"):
            extend_codes(table, count)
        return
    extended = extend_codes(table, count)
    extended.verify()
    assert (extended.codes[:num_tokens] == table.codes).all() and extended.table_sizes == table.table_sizes


def test_positional_codes_go_on_as_algorithm_1_would():
    assert (extend_codes(positional_codes(100, 3), 20).codes == positional_codes(120, 3).codes).all()
    large = extend_codes(positional_codes(250_002, 3), 45)
    assert (large.codes == positional_codes(250_047, 3).codes).all()
    with pytest.raises(
        ValueError, match=r"46 new tokens, but of 250,047 codes \(63 x 63 x 63\) only 45 are unused; .* 64 or more"
    ):
        extend_codes(positional_codes(250_002, 3), 46)


def test_rows_of_special_tokens_stay_theirs():
    table = positional_codes(103, 3, special_ids=[0, 2, 102])
    assert count_reserved_rows(table) == 3
    extended = extend_codes(table, 25)
    assert (extended.codes[103:] < np.array(table.table_sizes) - 3).all()
    with pytest.raises(ValueError, match="only 25 are unused"):
        extend_codes(table, 26)
    assert count_reserved_rows(plain_codes(10)) == 0


def test_a_code_space_beyond_64_bits():
    codes = np.random.default_rng(0).integers(2**31 - 1, size=(50, 4))
    extended = extend_codes(CodeTable(codes, [2**31 - 1] * 4), 3)
    assert (extended.codes[50:] == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]).all()


def test_a_vector_leads_to_the_nearest_leaf_with_room():
    draw = np.random.default_rng(1)
    centres = 10 * draw.standard_normal((16, 8))
    vectors = (np.repeat(centres, 3, axis=0) + 0.1 * draw.standard_normal((48, 8))).astype(np.float32)
    table = clustered_codes(vectors, num_tables=3, table_size=4)
    extended = extend_codes(table, 16, centres, vectors)
    extended.verify()
    assert (extended.codes[48:, :2] == table.codes[::3, :2]).all(), "one place is left in each of 16 leaves of 4"
    with pytest.raises(ValueError, match="code space is full"):
        extend_codes(extended, 1, centres[:1], np.concatenate([vectors, centres]))
    crowd = extend_codes(table, 3, centres[[5, 5, 5]], vectors)
    near = np.argsort(np.square(centres - centres[5]).sum(axis=1))[:3]
    assert {tuple(code) for code in crowd.codes[48:, :2]} == {tuple(code) for code in table.codes[near * 3, :2]}


def test_vectors_that_do_not_fit():
    table = positional_codes(20, 3)
    for new, known in (
        (np.zeros((2, 4)), None),
        (np.zeros((3, 4)), np.zeros((20, 4))),
        (np.zeros((2, 4)), np.zeros((20, 5))),
        (np.full((2, 4), np.nan), np.zeros((20, 4))),
    ):
        with pytest.raises(ValueError, match="vector"):
            extend_codes(table, 2, new, known)


def test_leaves_that_are_full_are_said_to_be():
    table = CodeTable([[0, 0], [0, 1]], [2, 2])
    with pytest.raises(ValueError, match="leaves in use are full"):
        extend_codes(table, 1, np.zeros((1, 2)), np.zeros((2, 2)))
