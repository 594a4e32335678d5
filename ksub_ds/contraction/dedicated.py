"""The dedicated tokens: a dense block of logits h · D^T + b, beside the fold over all others.

    log Z = logaddexp(log Z of the others, log Z of these)

Both parts know their own softmax; a probability among all tokens is one within its part times the part's share of Z.
Logits are float32, as those of a plain decoder, and those of a block of rows are held at a time: with every token
dedicated this is the plain decoder. Nothing here asks the device for a value.

Legend: R rows, F dedicated tokens, d the width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOGITS_PER_BLOCK = {"cpu": 2**21, "cuda": 2**27}  # of a search
SMALLEST_BIAS = -1e30  # stands for -inf, whose differences are NaN


def _product(a: Tensor, b: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return a @ b, plus `add`, in float32: all of the block's work that grows with R, F and d together."""
    return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, out=out)


class DedicatedSoftmax(NamedTuple):
    """The softmax of R rows over the dedicated tokens alone.

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


class DedicatedBlock:
    """The dedicated tokens in one pass over the rows, with the gradients that it sums.

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
        self.rows = rows.detach().float()
        self.bias = None if bias is None else bias.detach().float().clamp(min=SMALLEST_BIAS)
        # One workspace for all blocks, as the leaves of the trie have.
        self._logits = self.rows.new_empty(num_rows, len(rows))
        self.grad_rows = torch.zeros_like(self.rows) if with_gradients else None
        self.grad_bias = self.rows.new_zeros(len(rows)) if with_bias_gradient else None

    def softmax(self, hidden: Tensor, labels: Tensor | None = None) -> DedicatedSoftmax:
        """Take the softmax of a block of rows, which the next block overwrites.

        Args:
            hidden: (R, d) decoder inputs.
            labels: (R,) places among the dedicated tokens; negative where the label is none of them. [none is]
        """
        logits = _product(hidden.detach().float(), self.rows.t(), self.bias, self._logits[: len(hidden)])
        labels = torch.full_like(logits[:, 0], -1, dtype=torch.int64) if labels is None else labels
        column = labels.clamp(min=0).unsqueeze(1)
        label_logits = torch.where(labels >= 0, logits.gather(1, column).squeeze(1).double(), 0.0)
        top = logits.amax(dim=1, keepdim=True)
        scaled = logits.sub_(top).exp_()
        at_label = scaled.gather(1, column).squeeze(1)
        # Without the label first: the gradient there is minus the sum of the others.
        rest = scaled.scatter_(1, column, 0.0).sum(dim=1)
        log_partition = (rest + at_label).double().log() + top.squeeze(1).double()
        return DedicatedSoftmax(log_partition, label_logits, scaled, at_label, rest)

    def add_gradients_(
        self, hidden: Tensor, labels: Tensor, softmax: DedicatedSoftmax, share: Tensor, others: Tensor, out: Tensor
    ) -> None:
        """Add a block to the gradients of D and of the bias, and write that of its hidden rows.

        Args:
            hidden: (R, d) as `softmax` was given, like
            labels: (R,).
            softmax: of these; it is overwritten.
            share: (R,) of the dedicated tokens in Z; 0 in rows that do not count.
            others: (R,) of the other tokens, also 0 there.
            out: (R, d) where the gradient of the hidden rows goes.
        """
        assert self.grad_rows is not None, "made without gradients"
        weight = share.float() / (softmax.rest + softmax.at_label)
        at_label = torch.where(labels >= 0, -(softmax.rest * weight + others.float()), softmax.at_label * weight)
        gradient = softmax.scaled.mul_(weight.unsqueeze(1))
        gradient.scatter_(1, labels.clamp(min=0).unsqueeze(1), at_label.unsqueeze(1))
        _product(gradient, self.rows, out=out)
        _product(gradient.t(), hidden.detach().float(), self.grad_rows, self.grad_rows)
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(dim=0)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k largest logits of (R, d) rows: (R, k) in falling order, and their (R, k) places."""
        numbers = LOGITS_PER_BLOCK.get(hidden.device.type, LOGITS_PER_BLOCK["cpu"])
        blocks = hidden.float().split(max(1, numbers // len(self.rows)))
        found = [_product(rows, self.rows.t(), self.bias).topk(k, dim=1) for rows in blocks]
        return torch.cat([logits for logits, _ in found]), torch.cat([places for _, places in found])


def share_of(log_partition: Tensor, others: Tensor) -> Tensor:
    """Return the share of Z that a part of the tokens has, beside the others, from log Z of both, (R,)."""
    return torch.sigmoid(log_partition - others)
