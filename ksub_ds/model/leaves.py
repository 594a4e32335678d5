"""The last table: W[leaf] = sum over codes of A[leaf, code] · e_K[code], with A[leaf of n, f_K(n)] = w_n.

A is stored whole when its leaves use a fair share of the table's rows (balanced codes: 12 %), and in
CSR form when they do not (unbalanced clusters: the table is as large as the largest leaf).
Legend: R rows, S leaves, M rows of the table, N entries of A (the tokens).
"""

import warnings
from functools import cached_property

import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions

SPARSE_BELOW = 1 / 16  # share of used cells under which CSR beats the dense product


def csr_matrix(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """CSR matrix from coordinates sorted by row."""
    row_starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
    row_starts[1:] = torch.cumsum(torch.bincount(row, minlength=shape[0]), 0)
    with warnings.catch_warnings():  # products are all that is used of torch's sparse tensors, and those are settled
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(row_starts, column, values, shape, check_invariants=False)


class LeafShape:
    """Which cells of A are used, (S, M). Built once per code table; entries in the order of the token ids."""

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
        """The entries of A: the weights, or ones."""
        return (
            torch.ones(len(self.position), dtype=self.dtype, device=self.position.device)
            if weights is None
            else weights
        )

    @cached_property
    def by_leaf(self) -> Tensor:
        """Order of the entries by leaf and code, as CSR wants them."""
        return torch.argsort(self.position)

    @cached_property
    def by_code(self) -> Tensor:
        """Order of the entries by code and leaf, for the transposed matrix."""
        return torch.argsort(self.position % self.shape[1] * self.shape[0] + self.position // self.shape[1])


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
        """W of the leaves, (R, S)."""
        return torch.mm(e_RM, self.matrix.t(), out=self.workspace[: len(e_RM)])

    def backward(self, e_RM: Tensor, grad_RS: Tensor) -> Tensor:
        """Gradient of e_K, (R, M); adds this block's share of the gradient of A."""
        if self.gradient is not None:
            self.gradient.addmm_(grad_RS.t(), e_RM)
        return grad_RS @ self.matrix

    def weights_gradient(self) -> Tensor:
        """Gradient of the weights, (N,), summed over all blocks."""
        assert self.gradient is not None, "made without a gradient"
        return self.gradient.view(-1).index_select(0, self.position)


class SparseLeaves:
    """A in CSR form, for one pass over the rows."""

    def __init__(self, shape: LeafShape, weights: Tensor | None, rows: int, with_gradient: bool):
        values, (leaves, codes) = shape.values(weights), shape.shape
        position, transposed = shape.position[shape.by_leaf], shape.position[shape.by_code]
        self.by_leaf = shape.by_leaf
        self.matrix = csr_matrix(position // codes, position % codes, values[shape.by_leaf], (leaves, codes))
        self.transposed = csr_matrix(transposed % codes, transposed // codes, values[shape.by_code], (codes, leaves))
        self.gradient = self.matrix * 0 if with_gradient else None

    def forward(self, e_RM: Tensor) -> Tensor:
        """W of the leaves, (R, S)."""
        return (self.matrix @ e_RM.t()).t().contiguous()

    def backward(self, e_RM: Tensor, grad_RS: Tensor) -> Tensor:
        """Gradient of e_K, (R, M); adds this block's share of the gradient of A."""
        if self.gradient is not None:
            self.gradient = torch.sparse.sampled_addmm(self.gradient, grad_RS.t(), e_RM)
        return (self.transposed @ grad_RS.t()).t()

    def weights_gradient(self) -> Tensor:
        """Gradient of the weights, (N,), summed over all blocks."""
        assert self.gradient is not None, "made without a gradient"
        gradient = torch.empty_like(self.gradient.values())
        gradient[self.by_leaf] = self.gradient.values()
        return gradient
