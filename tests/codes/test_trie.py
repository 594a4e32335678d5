"""The trie and the minimal automaton accept exactly the codes in use."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds import positional_codes
from ksub_ds.codes.trie import Transitions, build_trie, merge_equal_states


@st.composite
def code_tables(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    space = int(np.prod(sizes))
    chosen = draw(st.lists(st.integers(0, space - 1), min_size=1, max_size=space, unique=True))
    return np.stack(np.unravel_index(chosen, sizes), axis=1).astype(np.int32), tuple(sizes)


def accepted(levels: list[Transitions], state: int = 0) -> set[tuple[int, ...]]:
    here = np.flatnonzero(levels[0].parent == state)
    if len(levels) == 1:
        return {(int(levels[0].code[t]),) for t in here}
    ends = [(int(levels[0].code[t]), accepted(levels[1:], int(levels[0].child[t]))) for t in here]
    return {(code, *rest) for code, tails in ends for rest in tails}


@given(code_tables())
def test_trie_and_automaton_accept_the_same_codes(table):
    codes, sizes = table
    trie = build_trie(codes, sizes)
    wanted = {tuple(row) for row in codes.tolist()}
    assert accepted(trie) == wanted == accepted(merge_equal_states(trie))
    for level in trie:
        assert (np.lexsort((level.code, level.parent)) == np.arange(len(level.code))).all()
    tokens = trie[-1].child
    assert sorted(tokens.tolist()) == list(range(len(codes)))
    assert (codes[tokens, -1] == trie[-1].code).all()


@given(code_tables())
def test_the_automaton_is_minimal(table):
    """No two of its states have the same continuations."""
    automaton = merge_equal_states(build_trie(*table))
    for depth, level in enumerate(automaton):
        tails = [frozenset(accepted(automaton[depth:], state)) for state in range(level.num_states)]
        assert len(set(tails)) == len(tails)


def test_positional_codes_collapse_to_at_most_two_states_a_level():
    for num_tables in range(2, 9):
        table = positional_codes(250002, num_tables)
        automaton = merge_equal_states(build_trie(table.codes, table.table_sizes))
        assert max(level.num_states for level in automaton) == 2
