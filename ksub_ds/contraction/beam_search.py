"""The k most probable tokens, exactly, without N logits: a beam over the codes' trie, with a proof.

A prefix of codes can gain at most the maxima of the tables it has not read (plus the largest bias).
The beam keeps the best prefixes of each level and remembers the best bound among those it dropped;
when the k-th result is at least that bound, nothing dropped could have been better. Rows without
this proof are searched again with a wider beam, in the end with all prefixes, so the answer is
always exact.
"""

import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions

FIRST_BEAM = 64
WIDER = 16
CANDIDATES_PER_BLOCK = 2**22


class TopKSearch:
    """Search structure of one code table on one device.

    Args:
        levels: the trie of `build_trie`.
    """

    def __init__(self, levels: list[Transitions], device: torch.device):
        self.codes = [torch.as_tensor(level.code, device=device) for level in levels]
        self.tokens = torch.as_tensor(levels[-1].child, device=device)
        self.bounds = []
        for level, code in zip(levels, self.codes, strict=True):
            parent = torch.as_tensor(level.parent, device=device)
            counts = torch.bincount(parent, minlength=level.num_states)
            starts = torch.zeros(level.num_states + 1, dtype=torch.int64, device=device)
            starts[1:] = counts.cumsum(0)
            assert int(starts[-1]) == len(code)
            self.bounds.append(starts)
        self.most_children = [int((starts[1:] - starts[:-1]).max()) for starts in self.bounds]
        self.most_states = max(level.num_states for level in levels)

    def __call__(self, scores: list[Tensor], bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Find the top k of sum over tables of scores[table][r, code] + bias[token].

        Args:
            scores: K matrices (R, M_k).
            bias: (N,) or None.
            k: 1 <= k <= N.

        Returns:
            (R, k) logits in falling order and their (R, k) token ids.
        """
        rows = len(scores[0])
        logits = scores[0].new_empty(rows, k)
        ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
        open_rows = torch.arange(rows, device=logits.device)
        beam = max(FIRST_BEAM, 2 * k)
        while len(open_rows):
            unproven = []
            block = max(1, CANDIDATES_PER_BLOCK // (min(beam, self.most_states) * max(self.most_children)))
            for some in open_rows.split(block):
                found, found_ids, proven = self._search([score[some] for score in scores], bias, k, beam)
                logits[some], ids[some] = found, found_ids
                unproven.append(some[~proven])
            open_rows = torch.cat(unproven) if beam < self.most_states else open_rows[:0]
            beam *= WIDER
        return logits, ids

    def _search(self, scores: list[Tensor], bias: Tensor | None, k: int, beam: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(scores[0])
        state = torch.zeros(rows, 1, dtype=torch.int64, device=scores[0].device)
        total = scores[0].new_zeros(rows, 1)
        best_dropped = scores[0].new_full((rows,), -torch.inf)
        still_to_gain = sum(score.amax(dim=1) for score in scores) + (0 if bias is None else bias.max())
        for level, (score, code) in enumerate(zip(scores, self.codes, strict=True)):
            last_level = level == len(scores) - 1
            still_to_gain = still_to_gain - score.amax(dim=1)
            start, stop = self.bounds[level][state], self.bounds[level][state + 1]
            child = start.unsqueeze(2) + torch.arange(self.most_children[level], device=start.device)
            exists = (child < stop.unsqueeze(2)).flatten(1)
            child = child.flatten(1).clamp_(max=len(code) - 1)
            candidate = total.repeat_interleave(self.most_children[level], dim=1) + score.gather(1, code[child])
            if last_level and bias is not None:
                candidate = candidate + bias[self.tokens[child]]
            candidate = candidate.masked_fill(~exists, -torch.inf)
            keep = k if last_level else beam
            if not last_level and candidate.shape[1] > keep:
                kept, place = candidate.topk(keep + 1, dim=1)
                best_dropped = torch.maximum(best_dropped, kept[:, -1] + still_to_gain)
                total, state = kept[:, :-1], child.gather(1, place[:, :-1])
            elif last_level:
                total, place = _topk_padded(candidate, keep)
                state = child.gather(1, place)
            else:
                total, state = candidate, child
        # Nothing dropped is a proof too, and the only one for a row of NaN or with fewer than k finite logits.
        enough = (total[:, -1] >= best_dropped) & (total[:, -1] > -torch.inf)
        return total, self.tokens[state], enough | (best_dropped == -torch.inf)


def _topk_padded(candidate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` that fills with -inf when there are fewer than k candidates (the beam was too narrow)."""
    missing = k - candidate.shape[1]
    if missing <= 0:
        return candidate.topk(k, dim=1)
    values, place = candidate.topk(candidate.shape[1], dim=1)
    fill = values.new_full((len(values), missing), -torch.inf)
    return torch.cat([values, fill], dim=1), torch.cat([place, place.new_zeros(fill.shape)], dim=1)
