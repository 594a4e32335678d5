"""Sums over all tokens of a product of one factor per table, without a number per token and row.

    Z[r] = sum over tokens n of w_n · e_1[r, f_1(n)] · ... · e_K[r, f_K(n)]

The codes' trie (or automaton, when all w_n = 1) is folded from the leaves to the root:

    W_K[r, leaf]   = sum over codes c of  A[leaf, c] · e_K[r, c]            A[leaf of n, f_K(n)] = w_n
    W_k[r, state]  = sum over codes c of  e_k[r, c] · W_{k+1}[r, child(state, c)],   k = K-1 .. 1
    Z[r]           = W_1[r, root]

The first line is one matrix product. A is stored whole when its leaves use a fair share of the table's rows
(balanced codes: 12 %), and in CSR form when they do not (unbalanced clusters: the table is as large as the
largest leaf). The other lines take one of three forms, by the shape of the level.

Legend: R rows, S states of a level (or leaves), C states of the next level, M rows of the level's table,
N entries of A (the tokens), T transitions, P distinct pairs (state, child).
"""

import warnings
from functools import cached_property

import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions

SPARSE_BELOW = 1 / 16  # share of used cells under which CSR beats the dense product


class CsrPattern:
    """Which entries a sparse matrix has. Built once, so that a matrix of it takes no count, which the host waits for.

    Args:
        row: (entries,) rows, in rising order.
        column: (entries,) columns.
        shape: of the matrix.
    """

    def __init__(self, row: Tensor, column: Tensor, shape: tuple[int, int]):
        self.shape = shape
        self.column = column
        self.row_starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
        self.row_starts[1:] = torch.cumsum(torch.bincount(row, minlength=shape[0]), 0)

    def matrix(self, values: Tensor) -> Tensor:
        """Return the CSR matrix with these entries."""
        with warnings.catch_warnings():
            # Products are all that is used of torch's sparse tensors, and those are settled. torch 2.11 says besides
            # that it does not check what it is told not to check.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta|Sparse invariant checks")
            return torch.sparse_csr_tensor(self.row_starts, self.column, values, self.shape, check_invariants=False)


class LeafShape:
    """The used cells of A, (S, M). Built once per code table; entries in the order of the token ids."""

    def __init__(self, level: Transitions, device: torch.device, dtype: torch.dtype):
        self.shape = (level.num_states, level.table_size)
        position = torch.as_tensor(level.parent * level.table_size + level.code, device=device)
        if not level.child.any():  # the automaton: its entries stand for classes of tokens, in any order
            self.position = position
        else:
            self.position = torch.empty_like(position)
            self.position[torch.as_tensor(level.child, device=device)] = position
        self.dtype = dtype
        self.is_dense = len(position) >= SPARSE_BELOW * level.num_states * level.table_size

    def values(self, weights: Tensor | None) -> Tensor:
        """Return the entries of A: the weights, or ones."""
        if weights is not None:
            return weights
        return torch.ones(len(self.position), dtype=self.dtype, device=self.position.device)

    @cached_property
    def by_leaf(self) -> Tensor:
        """Order of the entries by leaf and code, as CSR needs them."""
        return torch.argsort(self.position)

    @cached_property
    def by_code(self) -> Tensor:
        """Order of the entries by code and leaf, for the transposed matrix."""
        return torch.argsort(self.position % self.shape[1] * self.shape[0] + self.position // self.shape[1])

    @cached_property
    def pattern(self) -> CsrPattern:
        """A's entries in the order `by_leaf`."""
        position = self.position[self.by_leaf]
        return CsrPattern(position // self.shape[1], position % self.shape[1], self.shape)

    @cached_property
    def transposed_pattern(self) -> CsrPattern:
        """Those of A^T in the order `by_code`."""
        position = self.position[self.by_code]
        return CsrPattern(position % self.shape[1], position // self.shape[1], self.shape[::-1])


class DenseLeaves:
    """A stored whole, for one pass over the rows."""

    def __init__(self, shape: LeafShape, weights: Tensor | None, rows: int, with_gradient: bool):
        self.position = shape.position
        values = shape.values(weights)
        # One workspace for all blocks: touching fresh memory in each would cost more than the product saves.
        self.workspace = values.new_empty(rows, shape.shape[0])
        self.matrix = values.new_zeros(shape.shape)
        self.matrix.view(-1).index_copy_(0, self.position, values)
        self.gradient = torch.zeros_like(self.matrix) if with_gradient else None

    def forward(self, e_RM: Tensor) -> Tensor:
        """Return W of the leaves, (R, S)."""
        return torch.mm(e_RM, self.matrix.t(), out=self.workspace[: len(e_RM)])

    def backward(self, grad_RS: Tensor) -> Tensor:
        """Return the gradient of e_K, (R, M)."""
        return grad_RS @ self.matrix

    def add_gradient_(self, e_RM: Tensor, grad_RS: Tensor) -> None:
        """Add this block's share of the gradient of A."""
        assert self.gradient is not None, "made without a gradient"
        self.gradient.addmm_(grad_RS.t(), e_RM)

    def weights_gradient(self) -> Tensor:
        """Return the gradient of the weights, (N,), summed over all blocks."""
        assert self.gradient is not None, "made without a gradient"
        return self.gradient.view(-1).index_select(0, self.position)


class SparseLeaves:
    """A in CSR form, for one pass over the rows."""

    def __init__(self, shape: LeafShape, weights: Tensor | None, rows: int, with_gradient: bool):
        values = shape.values(weights)
        self.by_leaf = shape.by_leaf
        self.matrix = shape.pattern.matrix(values[shape.by_leaf])
        self.transposed = shape.transposed_pattern.matrix(values[shape.by_code])
        self.gradient = self.matrix * 0 if with_gradient else None

    def forward(self, e_RM: Tensor) -> Tensor:
        """Return W of the leaves, (R, S)."""
        return (self.matrix @ e_RM.t()).t().contiguous()

    def backward(self, grad_RS: Tensor) -> Tensor:
        """Return the gradient of e_K, (R, M)."""
        return (self.transposed @ grad_RS.t()).t()

    def add_gradient_(self, e_RM: Tensor, grad_RS: Tensor) -> None:
        """Add this block's share of the gradient of A."""
        assert self.gradient is not None, "made without a gradient"
        self.gradient = torch.sparse.sampled_addmm(self.gradient, grad_RS.t(), e_RM)

    def weights_gradient(self) -> Tensor:
        """Return the gradient of the weights, (N,), summed over all blocks."""
        assert self.gradient is not None, "made without a gradient"
        gradient = torch.empty_like(self.gradient.values())
        gradient[self.by_leaf] = self.gradient.values()
        return gradient


class CompleteLevel:
    """A tree level that reads every code in every state: one batched product of (S, M) with (M,)."""

    def __init__(self, level: Transitions):
        self.shape = (level.num_states, level.table_size)

    def forward(self, e_RM: Tensor, w_RC: Tensor) -> Tensor:
        """Return W of this level's states, (R, S), from e_k and W of the next level's."""
        return torch.bmm(w_RC.view(-1, *self.shape), e_RM.unsqueeze(2)).squeeze(2)

    def backward(self, e_RM: Tensor, w_RC: Tensor, grad_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of e_k, (R, M), and of the next level's W, (R, C). Overwrites `w_RC`."""
        w_RSM = w_RC.view(-1, *self.shape)
        grad_e = torch.bmm(grad_RS.unsqueeze(1), w_RSM).squeeze(1)
        return grad_e, torch.mul(grad_RS.unsqueeze(2), e_RM.unsqueeze(1), out=w_RSM).flatten(1)


class PairedLevel:
    """Few distinct pairs (state, child), as in the automaton of positional codes: first add up e_k per pair."""

    def __init__(self, level: Transitions, num_children: int, device: torch.device, dtype: torch.dtype):
        pairs, pair_of_transition = torch.unique(_pair_numbers(level, num_children), return_inverse=True)
        pair_of_transition, pairs = pair_of_transition.to(device), pairs.to(device)
        self.parent, self.child = pairs // num_children, pairs % num_children
        self.code_to_pair = torch.zeros(level.table_size, len(pairs), dtype=dtype, device=device)
        self.code_to_pair[torch.as_tensor(level.code, device=device), pair_of_transition] = 1
        self.pair_to_parent = torch.nn.functional.one_hot(self.parent, level.num_states).to(dtype)
        self.pair_to_child = torch.nn.functional.one_hot(self.child, num_children).to(dtype)

    def forward(self, e_RM: Tensor, w_RC: Tensor) -> Tensor:
        """Do as CompleteLevel.forward."""
        return (e_RM @ self.code_to_pair * w_RC.index_select(1, self.child)) @ self.pair_to_parent

    def backward(self, e_RM: Tensor, w_RC: Tensor, grad_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Do as CompleteLevel.backward, but leave `w_RC` as it is."""
        grad_RP = grad_RS.index_select(1, self.parent)
        grad_e = (grad_RP * w_RC.index_select(1, self.child)) @ self.code_to_pair.t()
        return grad_e, (grad_RP * (e_RM @ self.code_to_pair)) @ self.pair_to_child


class SparseLevel:
    """Any other level: gather per transition, then add up through sparse 0/1 matrices."""

    def __init__(self, level: Transitions, num_children: int, device: torch.device, dtype: torch.dtype):
        self.parent = torch.as_tensor(level.parent, device=device)
        self.code = torch.as_tensor(level.code, device=device)
        self.child = torch.as_tensor(level.child, device=device)
        self.sum_by_parent = SumBy(self.parent, level.num_states, dtype)
        self.sum_by_code = SumBy(self.code, level.table_size, dtype)
        self.sum_by_child = SumBy(self.child, num_children, dtype)

    def forward(self, e_RM: Tensor, w_RC: Tensor) -> Tensor:
        """Do as CompleteLevel.forward."""
        return self.sum_by_parent(w_RC.index_select(1, self.child) * e_RM.index_select(1, self.code))

    def backward(self, e_RM: Tensor, w_RC: Tensor, grad_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Do as CompleteLevel.backward, but leave `w_RC` as it is."""
        grad_RT = grad_RS.index_select(1, self.parent)
        grad_e = self.sum_by_code(grad_RT * w_RC.index_select(1, self.child))
        return grad_e, self.sum_by_child(grad_RT * e_RM.index_select(1, self.code))


class SumBy:
    """Sum columns that share an index: (R, T) -> (R, size). The adjoint of `index_select(1, index)`."""

    def __init__(self, index: Tensor, size: int, dtype: torch.dtype):
        order = torch.argsort(index, stable=True)
        ones = torch.ones(len(index), dtype=dtype, device=index.device)
        self.matrix = CsrPattern(index[order], order, (size, len(index))).matrix(ones)

    def __call__(self, values: Tensor) -> Tensor:
        """Add up the columns of (R, T) values: (R, size)."""
        return (self.matrix @ values.t()).t()


Level = CompleteLevel | PairedLevel | SparseLevel


def _pair_numbers(level: Transitions, num_children: int) -> Tensor:
    return torch.as_tensor(level.parent * num_children + level.child)


def _inner_level(level: Transitions, num_children: int, device: torch.device, dtype: torch.dtype) -> Level:
    if level.is_complete and level.is_tree:
        return CompleteLevel(level)
    few = len(torch.unique(_pair_numbers(level, num_children))) <= level.table_size
    return (PairedLevel if few else SparseLevel)(level, num_children, device, dtype)


class Contraction:
    """The fold of one code structure on one device. Build once, use for every block of rows."""

    def __init__(self, levels: list[Transitions], device: torch.device, dtype: torch.dtype):
        states = [level.num_states for level in levels]
        self.inner = [
            _inner_level(level, num_children, device, dtype)
            for level, num_children in zip(levels, states[1:], strict=False)
        ]
        self.leaf_shape = LeafShape(levels[-1], device, dtype)
        widths = [max(level.num_states, level.table_size) for level in levels]
        gathered = [
            len(level.code) for level, form in zip(levels, self.inner, strict=False) if isinstance(form, SparseLevel)
        ]
        self.numbers_per_row = max(widths + gathered)

    def leaves(self, weights: Tensor | None, rows: int, with_gradient: bool) -> DenseLeaves | SparseLeaves:
        """Return the leaf matrix A for token weights (N,), or for all weights 1, and blocks of up to `rows` rows."""
        form = DenseLeaves if self.leaf_shape.is_dense else SparseLeaves
        return form(self.leaf_shape, weights, rows, with_gradient)

    def forward(self, factors: list[Tensor], leaves: DenseLeaves | SparseLeaves) -> list[Tensor]:
        """Return W of every level, leaves first; the last, (R, 1), is Z. `factors` are the K matrices e_k, (R, M_k)."""
        folded = [leaves.forward(factors[-1])]
        for level, e_RM in zip(reversed(self.inner), reversed(factors[:-1]), strict=True):
            folded.append(level.forward(e_RM, folded[-1]))
        return folded

    def backward(
        self, factors: list[Tensor], leaves: DenseLeaves | SparseLeaves, folded: list[Tensor], grad_R1: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of the K factors and of the leaves' W, given the gradient of Z. Overwrites `folded`."""
        gradients = []
        grad = grad_R1
        for level, e_RM, w_RC in zip(self.inner, factors[:-1], reversed(folded[:-1]), strict=True):
            grad_e, grad = level.backward(e_RM, w_RC, grad)
            gradients.append(grad_e)
        gradients.append(leaves.backward(grad))
        return gradients, grad
