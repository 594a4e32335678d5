"""What follows from the codes alone: the tokens that share rows, their trie, the sums over it, the top-k search."""

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

    Dedicated tokens are in none of them: all is about the others, the shared ones, which are numbered anew.

    Args:
        codes: (N, K) integers, every row unique; not to be changed in place afterwards.
        table_sizes: the K numbers M_k.
        dedicated: (F,) token ids, or None.
    """

    def __init__(self, codes: Tensor, table_sizes: tuple[int, ...], dedicated: Tensor | None = None):
        self.codes = codes
        self.table_sizes = table_sizes
        self.dedicated = dedicated

    def __reduce__(self) -> tuple:
        # The sparse tensors of the contractions cannot be copied.
        return CodeStructure, (self.codes, self.table_sizes, self.dedicated)

    @property
    def num_dedicated(self) -> int:
        """The number of dedicated tokens, F."""
        return 0 if self.dedicated is None else len(self.dedicated)

    @property
    def num_shared(self) -> int:
        """The number of the others, N - F."""
        return len(self.codes) - self.num_dedicated

    @cached_property
    def is_plain(self) -> bool:
        """Whether the one table is the embedding itself. Asks the device for the codes, once."""
        ids = torch.arange(len(self.codes), device=self.codes.device)
        return self.table_sizes == (len(ids),) and self.dedicated is None and bool((self.codes[:, 0] == ids).all())

    @cached_property
    def _is_dedicated(self) -> Tensor:
        assert self.dedicated is not None, "there are no dedicated tokens"
        found = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        return found.index_fill(0, self.dedicated.long(), 1)

    @cached_property
    def shared(self) -> Tensor | None:
        """The ids of the shared tokens, (N - F,), in rising order; None if that is all."""
        return None if self.dedicated is None else self._is_dedicated.argsort(stable=True)[: self.num_shared]

    @cached_property
    def shared_codes(self) -> Tensor:
        """Their codes, (N - F, K)."""
        return self.codes if self.shared is None else self.codes[self.shared]

    @cached_property
    def places(self) -> Tensor:
        """Where each token stands, (N,): its place among the shared ones, or -1 - its place among the dedicated."""
        count = self._is_dedicated.cumsum(0)
        return torch.where(self._is_dedicated == 1, -count, torch.arange(len(count), device=count.device) - count)

    @cached_property
    def trie(self) -> list[Transitions]:
        """The trie of the codes, on the CPU."""
        return build_trie(self.shared_codes.cpu().numpy(), self.table_sizes)

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
        return why_not_here(self.codes.device) or plan_boxes(self.shared_codes.cpu().numpy(), self.table_sizes)

    @cached_property
    def fused(self) -> FusedContraction | None:
        """The sum over all tokens, each with a weight or with 1, by kernels that suit the device; None without them."""
        return None if isinstance(self.plan, str) else FusedContraction(self.shared_codes, self.table_sizes, self.plan)

    @property
    def form(self) -> str:
        """How the sum over all tokens is taken here, and why, for people."""
        if not self.num_shared:
            return "dense, every token is dedicated"
        form = repr(self.fused) if self.fused is not None else f"in torch ({self.plan})"
        return f"{form}, {self.num_dedicated:,} dedicated tokens beside it" if self.num_dedicated else form

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
