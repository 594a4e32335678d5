"""The most probable token of each row, exactly and without a search: the fold of the codes' trie in max-plus.

    V_K[leaf, r]  = max over the leaf's tokens n of  s_K[r, f_K(n)] + b_n
    V_k[state, r] = max over codes c of  s_k[r, c] + V_{k+1}[child(state, c), r],   k = K-1 .. 2

This is the fold of sum_product.py with max for + and + for ·. One path per row is then walked down from the root: among
the codes of the state reached, it takes the first one whose s_k + V_{k+1} is largest. The cost is that of N additions a
row whatever the scores and the bias are, and nothing depends on data: a device is never asked for a number.

Without a bias, two states with equal continuations have the same V: the fold then goes over the minimal automaton, and
the walk follows the trie beside it, whose children stand in the same order.

Legend: R rows, S states of a level, T transitions, M rows of the level's table, L longest list of children.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions

VALUES_PER_BLOCK = {"cpu": 2**20, "cuda": 2**27}  # numbers V held per block of rows; a quarter is gathered at a time


class _Segments(NamedTuple):
    """States with about as many children each: lists of equal length, a shorter one filled with its last child.

    Attributes:
        code: (L, S) code of each child.
        child: (L, S) its place in V of the next level; the token's id on the last level.
    """

    code: Tensor
    child: Tensor


class _Level:
    """One level of the automaton on a device.

    Attributes:
        segments: the states by size of their lists, which at most double within one of them.
        place: (S,) where each state stands in V, the order of the segments.
        code, child: (T,) of each transition; the child as in `_Segments`.
        state: (T,) the child's number in the next level.
        start, stop: (S,) transitions of each state.
        most_children: of any state.
    """

    def __init__(self, level: Transitions, place_of_child: np.ndarray | None, device: torch.device):
        count = np.bincount(level.parent, minlength=level.num_states)
        stop = np.cumsum(count)
        start = stop - count
        child = level.child if place_of_child is None else place_of_child[level.child]
        size = np.ceil(np.log2(count))
        groups = [np.flatnonzero(size == each) for each in np.unique(size)]
        self.segments = []
        for states in groups:
            lists = np.minimum(start[states] + np.arange(count[states].max())[:, None], stop[states] - 1)  # (L, S)
            self.segments.append(
                _Segments(*(torch.as_tensor(each[lists], device=device) for each in (level.code, child)))
            )
        place = np.empty(level.num_states, dtype=np.int64)
        place[np.concatenate(groups)] = np.arange(level.num_states)
        self.place = place
        self.code, self.child, self.state, self.start, self.stop = (
            torch.as_tensor(each, device=device) for each in (level.code, child, level.child, start, stop)
        )
        self.most_children = int(count.max())

    def children(self, state: Tensor) -> Tensor:
        """List the transitions of (R,) states: (R, L), filled with each state's last."""
        numbers = torch.arange(self.most_children, device=state.device)
        return torch.minimum(self.start[state].unsqueeze(1) + numbers, self.stop[state].unsqueeze(1) - 1)


class MaxPlusFold:
    """The fold of one code structure on one device. Build once, use for every block of rows.

    Args:
        levels: the trie, or its minimal automaton if there is never a bias.
        trie: of the same codes.
        device: where it runs.

    Attributes:
        rows_per_block: how many rows to give at a time.
    """

    def __init__(self, levels: list[Transitions], trie: list[Transitions], device: torch.device):
        built: list[_Level] = []
        for level in reversed(levels):
            built.append(_Level(level, built[-1].place if built else None, device))
        self._levels = built[::-1]
        self._trie_starts = [
            torch.as_tensor(np.searchsorted(level.parent, np.arange(level.num_states)), device=device) for level in trie
        ]
        self._tokens = torch.as_tensor(trie[-1].child, device=device)
        self._numbers = VALUES_PER_BLOCK.get(device.type, VALUES_PER_BLOCK["cpu"])
        numbers_per_row = sum(level.num_states for level in levels[1:]) + self._levels[0].most_children
        self.rows_per_block = max(1, self._numbers // numbers_per_row)

    def leaf_bias(self, bias: Tensor) -> list[Tensor]:
        """Bring the bias, (N,), to the order of the leaves' segments, for all blocks of a call."""
        return [bias[segments.child] for segments in self._levels[-1].segments]

    def __call__(self, scores: list[Tensor], bias: Tensor | None, leaf_bias: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Find the token with the largest sum over tables of scores[table][r, code] + bias[token].

        Args:
            scores: K matrices (R, M_k).
            bias: (N,); None over the automaton.
            leaf_bias: of `leaf_bias`; not used without a bias.

        Returns:
            (R,) logits and (R,) token ids. Where several are largest, the first in the order of the codes; in a row of
            NaN, any.
        """
        folded: list[Tensor] = []  # V of the levels 2 .. K, the last level first
        for level, score in zip(self._levels[:0:-1], scores[:0:-1], strict=True):
            below: Tensor | list[Tensor] | None = folded[-1] if folded else None if bias is None else leaf_bias
            folded.append(self._fold(level, score.t().contiguous(), below))
        values = [*folded[::-1], bias]  # what follows each level's children

        rows = len(scores[0])
        state = trie_state = torch.zeros(1, dtype=torch.int64, device=scores[0].device)  # all rows start at the root
        logits = None
        for level, score, value, trie_start in zip(self._levels, scores, values, self._trie_starts, strict=True):
            transitions = level.children(state)
            candidate = score.gather(1, level.code[transitions].expand(rows, -1))
            if value is not None:
                child = level.child[transitions]
                candidate += value[child] if value.ndim == 1 else value.t().gather(1, child.expand(rows, -1))
            best, chosen = candidate.max(dim=1)  # the first of equal ones
            logits = best if logits is None else logits
            taken = transitions.expand(rows, -1).gather(1, chosen.unsqueeze(1)).squeeze(1)
            trie_state = trie_start[trie_state] + (taken - level.start[state])  # also the number of the transition
            state = level.state[taken]
        assert logits is not None, "there is at least one table"
        return logits, self._tokens[trie_state]

    def _fold(self, level: _Level, score_MR: Tensor, below: Tensor | list[Tensor] | None) -> Tensor:
        """Return V of a level, (S, R).

        Args:
            level: not the first.
            score_MR: s_k.
            below: V of the next level, (C, R); on the last level the bias in segments, or None.
        """
        rows = score_MR.shape[1]
        folded = score_MR.new_empty(len(level.place), rows)
        # One workspace for all parts: on a CPU, touching fresh memory for each costs several times as much as the sums.
        numbers = max(self._numbers // 4, level.most_children * rows)
        spaces = score_MR.new_empty(2 if isinstance(below, Tensor) else 1, numbers)

        def gather(values: Tensor, index: Tensor, space: Tensor) -> Tensor:
            out = space[: index.numel() * rows].view(index.numel(), rows)
            return torch.index_select(values, 0, index.reshape(-1), out=out)

        done = 0
        for number, segments in enumerate(level.segments):
            longest, states = segments.code.shape
            step = max(1, numbers // (longest * max(1, rows)))
            for first in range(0, states, step):
                part = slice(first, first + step)
                total = gather(score_MR, segments.code[:, part], spaces[0])
                if isinstance(below, Tensor):
                    total += gather(below, segments.child[:, part], spaces[1])
                elif below is not None:
                    total += below[number][:, part].reshape(-1, 1)
                width = len(total) // longest
                torch.amax(total.view(longest, width, rows), dim=0, out=folded[done : done + width])
                done += width
        return folded
