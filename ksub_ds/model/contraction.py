"""Sums over all tokens of a product of one factor per table, without a number per token and row.

    Z[r] = sum over tokens n of w_n · e_1[r, f_1(n)] · ... · e_K[r, f_K(n)]

The codes' trie (or automaton, when all w_n = 1) is folded from the leaves to the root:

    W_K[r, leaf]   = sum over codes c of  A[leaf, c] · e_K[r, c]      A holds w_n at (leaf of n, f_K(n)): one GEMM
    W_k[r, state]  = sum over codes c of  e_k[r, c] · W_{k+1}[r, child(state, c)],   k = K-1 .. 1
    Z[r]           = W_1[r, root]

Shapes: R rows, S states of a level, M rows of its table, T transitions. A level that reads every
code in every state is one batched matrix product; otherwise sums go through sparse 0/1 matrices.
"""

import warnings

import torch
from torch import Tensor

from ksub_ds.codes.trie import Transitions

SPARSE_BELOW = 1 / 16  # share of used cells in the leaf matrix under which CSR beats the dense GEMM


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """CSR matrix from coordinates sorted by row."""
    row_starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
    row_starts[1:] = torch.cumsum(torch.bincount(row, minlength=shape[0]), 0)
    with warnings.catch_warnings():  # products are all that is used of torch's sparse tensors, and those are settled
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(row_starts, column, values, shape, check_invariants=False)


class SumBy:
    """Sum columns that share an index: (R, T) -> (R, size). The adjoint of `x[:, index]`."""

    def __init__(self, index: Tensor, size: int, dtype: torch.dtype):
        order = torch.argsort(index, stable=True)
        ones = torch.ones(len(index), dtype=dtype, device=index.device)
        self.matrix = _csr(index[order], order, ones, (size, len(index)))

    def __call__(self, values: Tensor) -> Tensor:
        return (self.matrix @ values.t()).t()


class InnerLevel:
    """One table between root and leaves: contracts the next level's W with e_k."""

    def __init__(self, level: Transitions, num_children: int, device: torch.device, dtype: torch.dtype):
        self.shape = (level.num_states, level.table_size)
        child = torch.as_tensor(level.child, device=device)
        self.child = None if level.is_tree else child
        self.sum_by_child = None if level.is_tree else SumBy(child, num_children, dtype)
        self.complete = level.is_complete
        if not self.complete:
            self.parent = torch.as_tensor(level.parent, device=device)
            self.code = torch.as_tensor(level.code, device=device)
            self.sum_by_parent = SumBy(self.parent, level.num_states, dtype)
            self.sum_by_code = SumBy(self.code, level.table_size, dtype)

    def _gather(self, children_RC: Tensor) -> Tensor:
        return children_RC if self.child is None else children_RC.index_select(1, self.child)

    def forward(self, e_RM: Tensor, children_RC: Tensor) -> Tensor:
        """W of this level's states, (R, S), from W of the next level's, (R, C)."""
        w_RT = self._gather(children_RC)
        if self.complete:
            return torch.bmm(w_RT.reshape(-1, *self.shape), e_RM.unsqueeze(2)).squeeze(2)
        return self.sum_by_parent(w_RT * e_RM.index_select(1, self.code))

    def backward(self, e_RM: Tensor, children_RC: Tensor, grad_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of e_k, (R, M), and of the next level's W, (R, C). Overwrites `children_RC`."""
        w_RT = self._gather(children_RC)
        if self.complete:
            w_RSM = w_RT.reshape(-1, *self.shape)
            grad_e = torch.bmm(grad_RS.unsqueeze(1), w_RSM).squeeze(1)
            grad_RT = torch.mul(grad_RS.unsqueeze(2), e_RM.unsqueeze(1), out=w_RSM).flatten(1)
        else:
            spread_RT = grad_RS.index_select(1, self.parent)
            grad_e = self.sum_by_code(spread_RT * w_RT)
            grad_RT = spread_RT * e_RM.index_select(1, self.code)
        return grad_e, grad_RT if self.sum_by_child is None else self.sum_by_child(grad_RT)


class DenseLeaves:
    """The last table, with the leaf matrix A stored whole: (S, M)."""

    def __init__(self, position: Tensor, values: Tensor, shape: tuple[int, int], rows: int, with_gradient: bool):
        self.position = position
        self.workspace = values.new_empty(
            rows, shape[0]
        )  # one for all blocks: fresh pages cost more than the GEMM saves
        self.matrix = values.new_zeros(shape)
        self.matrix.view(-1)[position] = values
        self.gradient = torch.zeros_like(self.matrix) if with_gradient else None

    def forward(self, e_RM: Tensor) -> Tensor:
        """W of the leaves, (R, S)."""
        return torch.mm(e_RM, self.matrix.t(), out=self.workspace[: len(e_RM)])

    def backward(self, e_RM: Tensor, grad_RS: Tensor) -> Tensor:
        """Gradient of e_K, (R, M); adds this block's share of the gradient of A."""
        if self.gradient is not None:
            self.gradient.addmm_(grad_RS.t(), e_RM)
        return grad_RS @ self.matrix

    def values_gradient(self) -> Tensor:
        """Gradient of `values`, summed over all blocks."""
        return self.gradient.view(-1)[self.position]


class SparseLeaves:
    """The last table, with A in CSR form: for codes whose leaves use few rows of a large table."""

    def __init__(self, position: Tensor, values: Tensor, shape: tuple[int, int], rows: int, with_gradient: bool):
        self.matrix = _csr(position // shape[1], position % shape[1], values, shape)
        by_code = torch.argsort(position % shape[1], stable=True)
        self.transposed = _csr(
            (position % shape[1])[by_code], (position // shape[1])[by_code], values[by_code], shape[::-1]
        )
        self.gradient = self.matrix * 0 if with_gradient else None

    def forward(self, e_RM: Tensor) -> Tensor:
        """W of the leaves, (R, S)."""
        return (self.matrix @ e_RM.t()).t()

    def backward(self, e_RM: Tensor, grad_RS: Tensor) -> Tensor:
        """Gradient of e_K, (R, M); adds this block's share of the gradient of A."""
        if self.gradient is not None:
            self.gradient = torch.sparse.sampled_addmm(self.gradient, grad_RS.t(), e_RM)
        return (self.transposed @ grad_RS.t()).t()

    def values_gradient(self) -> Tensor:
        """Gradient of `values`, summed over all blocks."""
        return self.gradient.values()


class Contraction:
    """The fold of one code structure on one device. Build once, use for every block of rows."""

    def __init__(self, levels: list[Transitions], device: torch.device, dtype: torch.dtype):
        sizes = [level.num_states for level in levels]
        self.inner = [
            InnerLevel(level, next_size, device, dtype) for level, next_size in zip(levels, sizes[1:], strict=False)
        ]
        leaves = levels[-1]
        self.leaf_shape = (leaves.num_states, leaves.table_size)
        self.leaf_position = torch.as_tensor(leaves.parent * leaves.table_size + leaves.code, device=device)
        self.leaf_token = torch.as_tensor(leaves.child, device=device)
        self.dtype = dtype
        widths = [max(level.num_states, level.table_size) for level in levels]
        self.numbers_per_row = max(widths + [len(level.code) for level in levels[:-1]])
        dense_enough = len(leaves.code) >= SPARSE_BELOW * leaves.num_states * leaves.table_size
        self._leaves_form = DenseLeaves if dense_enough else SparseLeaves

    def leaves(self, weights: Tensor | None, rows: int, with_gradient: bool) -> DenseLeaves | SparseLeaves:
        """The leaf matrix for token weights (N,), or for all weights 1, and blocks of up to `rows` rows."""
        if weights is None:
            values = torch.ones(len(self.leaf_position), dtype=self.dtype, device=self.leaf_position.device)
        else:
            values = weights[self.leaf_token]
        return self._leaves_form(self.leaf_position, values, self.leaf_shape, rows, with_gradient)

    def forward(self, factors: list[Tensor], leaves: DenseLeaves | SparseLeaves) -> list[Tensor]:
        """W of every level, leaves first; the last, (R, 1), is Z. `factors` are the K matrices e_k, (R, M_k)."""
        folded = [leaves.forward(factors[-1])]
        for level, e_RM in zip(reversed(self.inner), reversed(factors[:-1]), strict=True):
            folded.append(level.forward(e_RM, folded[-1]))
        return folded

    def backward(
        self, factors: list[Tensor], leaves: DenseLeaves | SparseLeaves, folded: list[Tensor], grad_R1: Tensor
    ) -> list[Tensor]:
        """Gradients of the K factors, given the gradient of Z. Uses up `folded`."""
        gradients = []
        grad = grad_R1
        for level, e_RM, children in zip(self.inner, factors[:-1], reversed(folded[:-1]), strict=True):
            grad_e, grad = level.backward(e_RM, children, grad)
            gradients.append(grad_e)
        gradients.append(leaves.backward(factors[-1], grad))
        return gradients

    def weights_gradient(self, leaves: DenseLeaves | SparseLeaves) -> Tensor:
        """Gradient of the token weights, (N,), summed over all blocks."""
        gradient = torch.empty_like(leaves.values_gradient())
        gradient[self.leaf_token] = leaves.values_gradient()
        return gradient
