"""A dense block of logits h · D^T + b, of tokens with rows of their own, beside the sum over all others.

    log Z = logaddexp(log Z of the others, log Z of these)

Both parts know their own softmax; a probability among all tokens is one within its part times the part's share of Z.
Logits are float32, and those of a block of rows are held at a time: with every token in the block and no others, this
is the plain decoder. Nothing here asks the device for a value.

The products that grow with R, F and d together are float32 on a CPU. Anywhere else they are made for tensor cores,
which multiply bf16 numbers. Each operand is a sum of bf16 parts of falling size, and a product that of all pairs of
parts whose numbers add up to less than there are parts: six products of three parts each are within 2^-22 of each term,
three of two parts within 3 * 2^-16. The logits, which may be hundreds and must keep their digits, take three parts, the
gradients two. Tensor cores cut off where they add to float32: over many thousand terms that is 1e-5 of a sum whose
terms have one sign. So the inner dimension is cut into pieces, whose sums are added outside. Rows of F numbers, F being
any number, are stored as if it were a multiple of 8: tensor cores load and store pieces that begin at 16 bytes.

Legend: R rows, F tokens of the block, d the width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOGITS_PER_BLOCK = {"cpu": 2**21, "cuda": 2**27}  # of a search
SMALLEST_BIAS = -1e30  # stands for -inf, whose differences are NaN
LOGIT_PARTS = 3
FLOAT32_DEVICES = {"cpu"}  # without tensor cores
LONGEST_SUM = 1024  # terms that are added up in a tensor core
ALIGNED = 8  # numbers of bf16 are 16 bytes


def split(matrix: Tensor, parts: int = 2) -> list[Tensor]:
    """Split a float32 matrix into bf16 parts, the largest first; their rows begin at multiples of 16 bytes."""
    found = [_aligned_bfloat16(matrix)]
    for _ in range(parts - 1):
        matrix = matrix - found[-1]
        found.append(_aligned_bfloat16(matrix))
    return found


def _aligned_bfloat16(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    wide = matrix.new_empty(rows, columns + -columns % ALIGNED, dtype=torch.bfloat16)
    return wide[:, :columns].copy_(matrix)


def pairs(parts: int) -> list[tuple[int, int]]:
    """List which parts of the two operands are multiplied, small products first."""
    return [(first, total - first) for total in reversed(range(parts)) for first in range(total + 1)]


def product(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the product of two matrices in float32, given the parts of both."""
    total: Tensor | None = None
    for first, second in pairs(len(left)):
        term = _long_product(left[first], right[second])
        total = term if total is None else total.add_(term)
    assert total is not None, "there is at least one part"
    return total


def _long_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, in pieces of the inner dimension."""
    terms = left.shape[1]
    whole = terms // LONGEST_SUM * LONGEST_SUM
    if whole == 0:
        return multiply(left, right)
    pieces = left[:, :whole].unflatten(1, (-1, LONGEST_SUM)).transpose(0, 1)
    total = multiply(pieces, right[:whole].unflatten(0, (-1, LONGEST_SUM))).sum(dim=0)
    return total if whole == terms else total.add_(multiply(left[:, whole:], right[whole:]))


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two bf16 matrices, or of each of two batches, in float32.

    On CUDA tensor cores make it; elsewhere the same numbers come from float32 products.
    """
    if left.device.type != "cuda":
        return left.float() @ right.float()
    kernel = torch.mm if left.ndim == 2 else torch.bmm
    return kernel(left, right, out_dtype=torch.float32)


class _Float32Products:
    """Products of float32 matrices as they are.

    Args:
        rows: (F, d) their D.
        num_rows: the most rows of a block, all of whose logits go to one workspace; 0: to a new tensor each.
    """

    def __init__(self, rows: Tensor, num_rows: int):
        self.rows = rows
        self._logits = rows.new_empty(len(rows) * num_rows) if num_rows else None

    def logits(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Return h · D^T + b, (R, F): the transpose of D · h^T, which multiplies a quarter faster for few rows."""
        shape = (len(self.rows), len(hidden))
        out = None if self._logits is None else self._logits[: shape[0] * shape[1]].view(shape)
        logits = torch.mm(self.rows, hidden.t(), out=out).t()
        return logits if bias is None else logits.add_(bias)

    def gradients_(self, gradient: Tensor, hidden: Tensor, grad_hidden: Tensor, grad_rows: Tensor) -> None:
        """Given the gradient of the logits, (R, F), write that of the hidden rows and add to that of D."""
        torch.mm(gradient, self.rows, out=grad_hidden)
        grad_rows.addmm_(gradient.t(), hidden)


class _SplitProducts:
    """The same by products of bf16 parts.

    Args:
        rows: (F, d) their D.
        with_gradients: keep what the gradients take.
    """

    def __init__(self, rows: Tensor, with_gradients: bool):
        parts = split(rows, LOGIT_PARTS)
        self.parts = parts[:2] if with_gradients else []
        self._num_rows = len(rows)
        # All pairs of parts next to each other: one sum, small terms first, and (R, F) is written once.
        wide = [parts[second] for _, second in pairs(LOGIT_PARTS)]
        shape = len(rows) + -len(rows) % ALIGNED, len(wide) * rows.shape[1]
        self.wide_rows = rows.new_zeros(shape, dtype=torch.bfloat16)
        torch.cat(wide, dim=1, out=self.wide_rows[: len(rows)])

    def logits(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Do as _Float32Products.logits."""
        parts = split(hidden, LOGIT_PARTS)
        wide_hidden = torch.cat([parts[first] for first, _ in pairs(LOGIT_PARTS)], dim=1)
        logits = multiply(wide_hidden, self.wide_rows.t())[:, : self._num_rows]
        return logits if bias is None else logits.add_(bias)

    def gradients_(self, gradient: Tensor, hidden: Tensor, grad_hidden: Tensor, grad_rows: Tensor) -> None:
        """Do as _Float32Products.gradients_."""
        parts = split(gradient)
        grad_hidden.copy_(product(parts, self.parts))
        grad_rows.add_(product([part.t() for part in parts], split(hidden)))


class DenseSoftmax(NamedTuple):
    """The softmax of R rows over the tokens of the block alone.

    Attributes:
        log_partition: (R,) log Z of these tokens, float64.
        label_logits: (R,) float64; 0 where the label is another token.
        scaled: (R, F) exp(logit - top of the row), but 0 at the label.
        at_label: (R,) the number that stood there; at token 0 where the label is another token.
        rest: (R,) sum of `scaled`.
    """

    log_partition: Tensor
    label_logits: Tensor
    scaled: Tensor
    at_label: Tensor
    rest: Tensor


class DenseBlock:
    """The tokens of the block in one pass over the rows, with the gradients that it sums.

    Args:
        rows: (F, d) their rows D of the decoder.
        bias: (F,) or None.
        num_rows: the most rows of a block.
        with_gradients: make those of D and of the hidden rows.
        with_bias_gradient: make that of the bias too.
    """

    def __init__(
        self,
        rows: Tensor,
        bias: Tensor | None = None,
        num_rows: int = 0,
        with_gradients: bool = False,
        with_bias_gradient: bool = False,
    ):
        rows = rows.detach().float()
        self.num_tokens = len(rows)
        self.bias = None if bias is None else bias.detach().float().clamp(min=SMALLEST_BIAS)
        self._products: _Float32Products | _SplitProducts = (
            _Float32Products(rows, num_rows)
            if rows.device.type in FLOAT32_DEVICES
            else _SplitProducts(rows, with_gradients)
        )
        self.grad_rows = torch.zeros_like(rows) if with_gradients else None
        self.grad_bias = rows.new_zeros(len(rows)) if with_bias_gradient else None

    def softmax(self, hidden: Tensor, labels: Tensor | None = None) -> DenseSoftmax:
        """Take the softmax of a block of rows, which the next block overwrites.

        Args:
            hidden: (R, d) decoder inputs.
            labels: (R,) places among these tokens; negative where the label is none of them. [none is]
        """
        logits = self._products.logits(hidden.detach().float(), self.bias)
        labels = torch.full_like(logits[:, 0], -1, dtype=torch.int64) if labels is None else labels
        column = labels.clamp(min=0).unsqueeze(1)
        label_logits = torch.where(labels >= 0, logits.gather(1, column).squeeze(1).double(), 0.0)
        top = logits.amax(dim=1, keepdim=True)
        scaled = logits.sub_(top).exp_()
        at_label = scaled.gather(1, column).squeeze(1)
        # Without the label first: the gradient there is minus the sum of the others.
        rest = scaled.scatter_(1, column, 0.0).sum(dim=1)
        log_partition = (rest + at_label).double().log() + top.squeeze(1).double()
        return DenseSoftmax(log_partition, label_logits, scaled, at_label, rest)

    def add_gradients_(
        self, hidden: Tensor, labels: Tensor, softmax: DenseSoftmax, share: Tensor, others: Tensor | None, out: Tensor
    ) -> None:
        """Add a block to the gradients of D and of the bias, and write that of its hidden rows.

        Args:
            hidden: (R, d) as `softmax` was given, like
            labels: (R,).
            softmax: of these; it is overwritten.
            share: (R,) of these tokens in Z; 0 in rows that do not count.
            others: (R,) of the other tokens, also 0 there; None where there are no others.
            out: (R, d) where the gradient of the hidden rows goes.
        """
        assert self.grad_rows is not None, "made without gradients"
        weight = share.float() / (softmax.rest + softmax.at_label)
        all_others = softmax.rest * weight if others is None else softmax.rest * weight + others.float()
        at_label = torch.where(labels >= 0, -all_others, softmax.at_label * weight)
        gradient = softmax.scaled.mul_(weight.unsqueeze(1))
        gradient.scatter_(1, labels.clamp(min=0).unsqueeze(1), at_label.unsqueeze(1))
        self._products.gradients_(gradient, hidden.detach().float(), out, self.grad_rows)
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(dim=0)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k largest logits of (R, d) rows: (R, k) in falling order, and their (R, k) places."""
        numbers = LOGITS_PER_BLOCK.get(hidden.device.type, LOGITS_PER_BLOCK["cpu"])
        blocks = hidden.float().split(max(1, numbers // self.num_tokens))
        found = [self._products.logits(rows, self.bias).topk(k, dim=1) for rows in blocks]
        return torch.cat([logits for logits, _ in found]), torch.cat([places for _, places in found])


def share_of(log_partition: Tensor, others: Tensor) -> Tensor:
    """Return the share of Z that a part of the tokens has, beside the others, from log Z of both, (R,)."""
    return torch.sigmoid(log_partition - others)
