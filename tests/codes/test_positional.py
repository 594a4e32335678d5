"""Algorithm 1 against the paper's numbers and a hand-made table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds import plain_codes, positional_codes
from ksub_ds.codes.extension import extend_codes
from ksub_ds.codes.positional import smallest_base


@pytest.mark.parametrize(
    ("num_tokens", "num_tables", "base", "parameters"),
    [
        (50265, 2, 225, 115_200),
        (50265, 3, 37, 18_944),
        (50265, 4, 15, 7_680),
        (50265, 6, 7, 3_584),
        (50265, 8, 4, 2_048),
        (250002, 3, 63, 32_256),
        (50267, 2, 225, 115_200),
    ],
)
def test_the_papers_table_of_sizes(num_tokens, num_tables, base, parameters):
    table = positional_codes(num_tokens, num_tables)
    table.verify()
    assert table.table_sizes == (base,) * num_tables
    assert table.num_parameters(512) == parameters


def test_the_papers_typing_error_gives_other_sizes():
    assert [smallest_base(50627, k) for k in (2, 4)] == [226, 16]


def test_digits_by_hand():
    table = positional_codes(8, 2)  # M = 3; the first code is the lowest digit
    assert table.codes.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2], [1, 2]]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(-1, 1))
def test_base_is_exact_at_powers(base, exponent, offset):
    count = max(1, base**exponent + offset)
    found = smallest_base(count, exponent)
    assert found**exponent >= count and (found == 1 or (found - 1) ** exponent < count)


@given(st.integers(1, 5000), st.integers(1, 8))
def test_codes_are_unique_and_in_range(num_tokens, num_tables):
    table = positional_codes(num_tokens, num_tables)
    table.verify()
    base = table.table_sizes[0]
    assert (table.codes @ base ** np.arange(num_tables) == np.arange(num_tokens)).all()


@given(st.integers(2, 500), st.integers(1, 5), st.data())
def test_special_tokens_share_no_row(num_tokens, num_tables, data):
    special = data.draw(st.sets(st.integers(0, num_tokens - 1), min_size=1, max_size=min(5, num_tokens - 1)))
    table = positional_codes(num_tokens, num_tables, special)
    table.verify()
    for token in special:
        assert ((table.codes == table.codes[token]).sum(axis=0) == 1).all()
    ordinary = positional_codes(num_tokens - len(special), num_tables)
    assert table.table_sizes == tuple(size + len(special) for size in ordinary.table_sizes)
    rest = np.setdiff1d(np.arange(num_tokens), list(special))
    assert (table.codes[rest] == ordinary.codes).all()


def test_more_tables_than_bits():
    table = positional_codes(10, 80)
    assert (table.codes[:, :4] @ 2 ** np.arange(4) == np.arange(10)).all() and (table.codes[:, 4:] == 0).all()


@pytest.mark.parametrize("arguments", [(10**13, 3), (10, 10**8), (0, 2), (5, 0), (3, 1, [0, 1, 2]), (5, 1, [5])])
def test_counts_that_make_no_sense(arguments):
    with pytest.raises(ValueError):
        positional_codes(*arguments)


def test_plain_is_one_table_with_a_row_per_token():
    table = plain_codes(7)
    assert table.table_sizes == (7,) and table.codes[:, 0].tolist() == list(range(7))


def test_larger_tables_leave_room():
    roomy = positional_codes(250_002, 3, table_size=64)
    assert roomy.table_sizes == (64, 64, 64) and roomy.codes.max() == 63
    roomy.verify()
    assert extend_codes(roomy, 46).num_tokens == 250_048  # N rounded up to a multiple of 64
    assert positional_codes(250_002, 3, table_size=63).sha256 == positional_codes(250_002, 3).sha256
    with pytest.raises(ValueError, match="table size 62: too small for 250,002 tokens; 63 fits"):
        positional_codes(250_002, 3, table_size=62)
    assert positional_codes(100, 2, [0, 1], table_size=20).table_sizes == (20, 20)
