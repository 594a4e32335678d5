"""What follows from the codes alone: their trie, the sums over it, and the top-k search."""

from functools import cached_property

import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions, build_trie, merge_equal_states
from ksub_ds.contraction.beam_search import TopKSearch
from ksub_ds.contraction.fused import BoxPlan, FusedContraction, plan_boxes, why_not_here
from ksub_ds.contraction.max_plus import MaxPlusFold
from ksub_ds.contraction.sum_product import Contraction


class CodeStructure:
    """Structures derived from one tensor of codes, on its device; each is built when first used.

    A copy, or an unpickled one, starts empty: its parts are built again.

    Args:
        codes: (N, K) integers, every row unique; not to be changed in place afterwards.
        table_sizes: the K numbers M_k.
    """

    def __init__(self, codes: Tensor, table_sizes: tuple[int, ...]):
        self.codes = codes
        self.table_sizes = table_sizes

    def __reduce__(self) -> tuple:
        # The sparse tensors of the contractions cannot be copied.
        return CodeStructure, (self.codes, self.table_sizes)

    @cached_property
    def trie(self) -> list[Transitions]:
        """The trie of the codes, on the CPU."""
        return build_trie(self.codes.cpu().numpy(), self.table_sizes)

    @cached_property
    def weighted(self) -> Contraction:
        """The sum over all tokens, each with a weight of its own: over the trie."""
        return Contraction(self.trie, self.codes.device, torch.float32)

    @cached_property
    def unweighted(self) -> Contraction:
        """The sum over all tokens with weight 1: over the minimal automaton."""
        return Contraction(merge_equal_states(self.trie), self.codes.device, torch.float32)

    @cached_property
    def plan(self) -> BoxPlan | str:
        """The box of the fused sum, or why there is none here."""
        return why_not_here(self.codes.device) or plan_boxes(self.codes.cpu().numpy(), self.table_sizes)

    @cached_property
    def fused(self) -> FusedContraction | None:
        """The sum over all tokens, each with a weight or with 1, by kernels that suit the device; None without them."""
        return None if isinstance(self.plan, str) else FusedContraction(self.codes, self.table_sizes, self.plan)

    @property
    def form(self) -> str:
        """How the sum over all tokens is taken here, and why, for people."""
        return repr(self.fused) if self.fused is not None else f"in torch ({self.plan})"

    @cached_property
    def best_weighted(self) -> MaxPlusFold:
        """The best of all tokens, each with a bias of its own: over the trie."""
        return MaxPlusFold(self.trie, self.trie, self.codes.device)

    @cached_property
    def best_unweighted(self) -> MaxPlusFold:
        """The best of all tokens without a bias: over the minimal automaton."""
        return MaxPlusFold(merge_equal_states(self.trie), self.trie, self.codes.device)

    @cached_property
    def search(self) -> TopKSearch:
        """The exact top-k search."""
        return TopKSearch(self.trie, self.codes.device)
