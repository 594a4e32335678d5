"""The codes as a trie, and as the smallest acyclic automaton that accepts exactly the codes in use.

A state of level k stands for a prefix (f_1, ..., f_{k-1}); reading the code f_k takes it along a
transition to a state of level k + 1. The last level's states are the leaves (tokens that share all
codes but the last), and its transitions are the tokens.

Sums over all tokens of a product of K factors fold along this structure, one table at a time. Two
prefixes that continue in the same way need to be folded only once: merging them (from the leaves up)
leaves the minimal automaton. Positional codes below N collapse to two states a level ("the digits
so far do, or do not, exceed those of N - 1"), so a sum over 250,002 tokens touches 2·K·M numbers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Transitions:
    """All transitions out of one level, sorted by (parent, code).

    parent, code, child are integer arrays of length T. On the last level `child` numbers the
    token (in the trie) or is 0 (in the automaton, where all tokens end in one accepting state).
    """

    parent: np.ndarray
    code: np.ndarray
    child: np.ndarray
    num_states: int
    table_size: int

    @property
    def is_complete(self) -> bool:
        """Whether every state reads every code of the table."""
        return len(self.code) == self.num_states * self.table_size

    @property
    def is_tree(self) -> bool:
        """Whether the children are the next level's states in order, each once: no gather is needed."""
        return bool((self.child == np.arange(len(self.child))).all())


def build_trie(codes: np.ndarray, table_sizes: tuple[int, ...]) -> list[Transitions]:
    """Build the trie of all codes, one `Transitions` per table.

    Args:
        codes: (N, K), every row unique.
        table_sizes: the K numbers M_k.

    Returns:
        K levels; the root is state 0 of the first, the last level's children are token ids.
    """
    num_tokens, num_tables = codes.shape
    order = np.lexsort(codes.T[::-1])
    sorted_codes = codes[order]
    starts_new_prefix = np.zeros(num_tokens, dtype=bool)
    starts_new_prefix[0] = True
    state_at_position = np.zeros(num_tokens, dtype=np.int64)  # the state of each token, in trie order
    levels = []
    for k in range(num_tables):
        starts_new_prefix[1:] |= sorted_codes[1:, k] != sorted_codes[:-1, k]
        first = np.flatnonzero(starts_new_prefix)  # one position for each transition
        last_level = k == num_tables - 1
        levels.append(
            Transitions(
                parent=state_at_position[first],
                code=sorted_codes[first, k].astype(np.int64),
                child=order if last_level else np.arange(len(first)),
                num_states=int(state_at_position[-1]) + 1,
                table_size=table_sizes[k],
            )
        )
        state_at_position = np.cumsum(starts_new_prefix) - 1
    return levels


def merge_equal_states(trie: list[Transitions]) -> list[Transitions]:
    """Minimise a trie to an automaton: states with equal continuations become one, from the last level up."""
    merged: list[Transitions] = []
    class_of_child = np.zeros(len(trie[-1].child), dtype=np.int64)
    for level in reversed(trie):
        child = class_of_child[level.child]
        bounds = np.searchsorted(level.parent, np.arange(level.num_states + 1))
        classes: dict[tuple[bytes, bytes], int] = {}
        class_of_state = np.empty(level.num_states, dtype=np.int64)
        representatives: list[slice] = []
        for state in range(level.num_states):
            span = slice(bounds[state], bounds[state + 1])
            key = (level.code[span].tobytes(), child[span].tobytes())
            number = classes.setdefault(key, len(classes))
            if number == len(representatives):
                representatives.append(span)
            class_of_state[state] = number
        keep = np.concatenate([np.arange(span.start, span.stop) for span in representatives])
        lengths = [span.stop - span.start for span in representatives]
        merged.append(
            Transitions(
                parent=np.repeat(np.arange(len(representatives)), lengths),
                code=level.code[keep],
                child=child[keep],
                num_states=len(representatives),
                table_size=level.table_size,
            )
        )
        class_of_child = class_of_state
    return merged[::-1]
