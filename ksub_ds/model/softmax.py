"""The exact softmax over all N tokens, without N logits (docs/softmax.md derives it).

The logit of token n is a sum of K table scores and a bias, so exp(logit) is a product of K factors:

    s_k = h_k · E_k^T                        (B, M_k): h split into K parts, one small product per table
    logit_n = s_1[f_1(n)] + ... + s_K[f_K(n)] + b_n
    log Z = log sum_n exp(b_n) · prod_k e_k[f_k(n)] + sum_k max s_k,      e_k = exp(s_k - max s_k)

The sum is the `Contraction` of the codes' trie, or on a GPU the `FusedContraction` of their box: no (B, N),
no (N, d). The gradient with respect to s_k[c] is the probability that code c is the k-th of the predicted
token, which the same fold run backwards gives. Loss and gradients are made block by block of rows, in one
pass, so that nothing but the gradients themselves outlives a block.

Scores, their maxima and their exponents are taken in float64 (they are small), sums in float32.
When the maxima of the K tables meet in no token, Z underflows; rows with Z < 1e-25 are summed again
over explicit logits.

Dedicated tokens are no part of that sum: their logits are a dense block beside it (`DenseBlock`), and log Z is the
logaddexp of both. The plain decoder, K = 1, has no sum: on an accelerator all its tokens are in the dense block, on a
CPU it is torch's own loss in chunks of rows.

On the CPU, ignored rows are left out and labels are checked. Any other device is never asked for a value, as the
host would wait for it: there ignored rows stay and count as zero. The one exception is the underflow of the form
in torch, which asks which rows it must sum again.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ksub_ds.contraction.code_structure import CodeStructure
from ksub_ds.contraction.dense_block import DenseBlock, DenseSoftmax, share_of
from ksub_ds.contraction.fused import SMALLEST_SUM, FusedSoftmax, FusedWeights
from ksub_ds.contraction.precision import exact_products
from ksub_ds.model.embedding import SubEmbedding

BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**28}  # numbers of the widest level or table held per block
FEWEST_ROWS = 64  # fewer would read the plain decoder's N x d table too often
PLAIN_ROWS = 128  # of the plain decoder on a CPU at a time: half as many cost an eighth more
FALLBACK_NUMBERS = 2**20  # float64 logits per block of the underflow path
READ_BY_HOST = {"cpu"}  # devices whose values cost the host no wait
UNREACHABLE_BIAS = -1e9  # of shared tokens that are all masked: -inf has NaN differences, and 1e30 would swallow a loss
IGNORED = -100  # the label of rows that do not count, where labels are places and -1 says "among the others"


def factorized_cross_entropy(
    hidden: Tensor,
    layer: SubEmbedding,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Compute `F.cross_entropy(hidden @ layer.dense_weight().T + bias, labels)`, exactly, without the logits.

    Args:
        hidden: (..., d) decoder inputs, any float type; sums are in float32.
        layer: the tied sub-embedding; its tables and its dedicated rows receive gradients.
        labels: (...) token ids.
        bias: (N,) or None.
        ignore_index: the label of rows that do not count.
        reduction: "mean" over the labelled rows (nan when there are none, as torch's), or "sum".

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, labels that are no integers, on a CPU a label out of
            range.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    num_tokens = layer.num_embeddings
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != layer.embedding_dim:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be labels' shape {tuple(labels.shape)} + ({layer.embedding_dim},)"
        )
    if bias is not None and bias.shape != (num_tokens,):
        raise ValueError(f"bias must be of shape ({num_tokens},), not {tuple(bias.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be token ids, not of {labels.dtype}")
    labels = labels.reshape(-1).long()  # torch takes uint8 for a mask where it indexes
    hidden_BD = hidden.reshape(-1, hidden.shape[-1])
    if labels.device.type in READ_BY_HOST:
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if len(kept) != len(labels):
            hidden_BD, labels = hidden_BD[kept], labels[kept]
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_tokens):
            raise ValueError(f"labels must be {ignore_index} or token ids in [0, {num_tokens})")
    with exact_products(hidden.device):  # sums are float32 whatever the rest of the model is
        if labels.device.type in READ_BY_HOST and layer.structure.is_plain and layer.mixing is None and len(labels):
            return _plain_cross_entropy(hidden_BD, layer.tables[0], labels, bias, reduction)
        dense_rows = _dense_rows(layer)
        all_dense = dense_rows is not None and len(dense_rows) == num_tokens
        loss = _SummedLoss.apply(
            None if all_dense else layer.to_tables(hidden_BD), bias, None if dense_rows is None else hidden_BD,
            dense_rows, labels, ignore_index, layer, torch.is_grad_enabled(), *(() if all_dense else layer.tables),
        )  # fmt: skip
    if reduction == "sum":
        return loss
    return loss / (len(labels) if labels.device.type in READ_BY_HOST else (labels != ignore_index).sum())


def _plain_cross_entropy(hidden: Tensor, table: Tensor, labels: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    """Compute the loss of the plain decoder on a CPU, where torch's own is fastest: (B, d) rows, all of which count."""
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=PLAIN_ROWS, allow_retain_graph=True)
    dtype = torch.promote_types(table.dtype, torch.float32)
    rows, weight, offsets = (None if each is None else each.to(dtype) for each in (hidden, table, bias))
    return F.linear_cross_entropy(
        rows, weight, labels, linear_bias=offsets, reduction=reduction, options=chunks
    ).float()


@torch.no_grad()
def log_partition(hidden: Tensor, layer: SubEmbedding, bias: Tensor | None = None) -> Tensor:
    """Compute log Z of every row: (B, d) decoder inputs -> (B,) float64. No gradient."""
    with exact_products(hidden.device):
        run = _LossRun(layer, tuple(layer.tables), bias, _dense_rows(layer), len(hidden), False, False)
        blocks = (each.split(run.rows_per_block) for each in (layer.to_tables(hidden), hidden))
        return torch.cat([run.log_partition(rows, dense) for rows, dense in zip(*blocks, strict=True)])


def _dense_rows(layer: SubEmbedding) -> Tensor | None:
    """Return the rows of the tokens whose logits are a dense block, in rising order of ids; None if there are none.

    Made of tables and R, they are an input of the loss: autograd carries their gradient on.
    """
    if len(layer.tables) == 1 and layer.codes.device.type not in READ_BY_HOST:
        return layer.dense_weight().float()
    return None if layer.dedicated is None else layer.dedicated_weight()


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' negative log-likelihoods; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor | None,
        bias: Tensor | None,
        dense_hidden: Tensor | None,
        dense_rows: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        layer: SubEmbedding,
        with_gradients: bool,
        *tables: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        with_gradients = with_gradients and any(needs)
        run = _LossRun(layer, tables, bias, dense_rows, len(labels), with_gradients, with_gradients and needs[1])
        block_losses = []
        grad_hidden, grad_dense_hidden = (
            torch.empty_like(each, dtype=torch.float32) if with_gradients and each is not None else None
            for each in (hidden, dense_hidden)
        )
        for start in range(0, len(labels), run.rows_per_block):
            rows = slice(start, start + run.rows_per_block)
            hidden_rows, dense_hidden_rows, grad_rows, grad_dense_rows = (
                None if each is None else each[rows] for each in (hidden, dense_hidden, grad_hidden, grad_dense_hidden)
            )
            block = run.block(labels[rows], ignore_index, hidden_rows, dense_hidden_rows)
            block_losses.append(block.losses.sum())
            if with_gradients:
                run.add_gradients_(block, hidden_rows, dense_hidden_rows, grad_rows, grad_dense_rows)
        if with_gradients:
            others = (None,) * 4  # of labels, ignore_index, layer, with_gradients
            found = (
                grad_hidden,
                run.bias_gradient(),
                grad_dense_hidden,
                run.grad_dense_rows,
                *others,
                *run.grad_tables,
            )
            ctx.gradients = found
            inputs = (hidden, bias, dense_hidden, dense_rows, *others, *tables)
            ctx.dtypes = [getattr(tensor, "dtype", None) for tensor in inputs]
        return reduce(torch.add, block_losses).float() if block_losses else labels.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        places = [i for i, each in enumerate(ctx.gradients) if each is not None and ctx.needs_input_grad[i]]
        scaled = torch._foreach_mul([ctx.gradients[i] for i in places], grad_output)  # one kernel for all on a GPU
        found = {i: gradient.to(ctx.dtypes[i]) for i, gradient in zip(places, scaled, strict=True)}
        return tuple(found.get(i) for i in range(len(ctx.gradients)))


def _zeros_like(tables: tuple[Tensor, ...]) -> list[Tensor]:
    """Return float32 zeros of the tables' shapes: one buffer, filled at once, each part where a cache line begins."""
    sizes = [-(-table.numel() // 16) * 16 for table in tables]
    parts = torch.zeros(sum(sizes), dtype=torch.float32, device=tables[0].device).split(sizes)
    return [part[: table.numel()].view_as(table) for part, table in zip(parts, tables, strict=True)]


def _rows_per_block(device: torch.device, num_rows: int, numbers_per_row: int) -> int:
    numbers = BLOCK_NUMBERS.get(device.type, BLOCK_NUMBERS["cpu"])
    return max(1, min(num_rows, max(FEWEST_ROWS, numbers // numbers_per_row)))


class _DenseRows(NamedTuple):
    """A block of R rows in the dense block.

    Attributes:
        softmax: over its tokens.
        labels: (R,) places among them; negative where the label is another token.
        share: (R,) of these tokens in Z; 0 in rows that do not count.
        others: (R,) of the shared tokens, also 0 there; None where there are none.
    """

    softmax: DenseSoftmax
    labels: Tensor
    share: Tensor
    others: Tensor | None


class _Block(NamedTuple):
    """A block of R rows; its gradients are made before the next block, which overwrites the same workspaces.

    Attributes:
        losses: (R,) float64.
        shared: its part over the shared tokens, a `_TrieBlock` or `_FusedBlock`; None without them.
        dense: its part in the dense block; None without one.
    """

    losses: Tensor
    shared: "_TrieBlock | _FusedBlock | None"
    dense: _DenseRows | None


class _LossRun:
    """One call of the loss over all its blocks of rows: the shared tokens, and beside them those of the dense block.

    Either part may be absent. Both know the softmax over their own tokens, which becomes that over all of them by the
    part's share of Z; a label is among one part's tokens, and the gradient there is minus the sum of all other
    probabilities, those of the other part included.

    Attributes:
        rows_per_block: R, the most rows of a block.
        grad_tables: of the summed loss, by the shared tokens; empty without them or without gradients.
        grad_dense_rows: None without a dense block or without gradients.
    """

    def __init__(
        self,
        layer: SubEmbedding,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        dense_rows: Tensor | None,
        num_rows: int,
        with_gradients: bool,
        with_bias_gradient: bool,
    ):
        self.structure = structure = layer.structure
        self.num_tokens = layer.num_embeddings
        self.shared: _BlockedLoss | None = None
        self.dense: DenseBlock | None = None
        self.rows_per_block = max(1, num_rows)
        num_dense = 0 if dense_rows is None else len(dense_rows)
        if num_dense:
            self.rows_per_block = _rows_per_block(layer.codes.device, num_rows, num_dense)
        if num_dense < self.num_tokens:
            of_shared = bias
            if bias is not None and structure.shared is not None:
                of_shared = bias.detach()[structure.shared].float()
                of_shared = torch.where(of_shared.max().isneginf(), UNREACHABLE_BIAS, of_shared)
            form, num_rows = _loss_form(structure), min(num_rows, self.rows_per_block)
            self.shared = form(structure, tables, of_shared, num_rows, with_gradients, with_bias_gradient)
            self.rows_per_block = self.shared.rows_per_block
        self.grad_tables = [] if self.shared is None else self.shared.grad_tables
        # The ids of its tokens, where they are not all.
        self.dense_ids = structure.dedicated if num_dense and self.shared is not None else None
        if dense_rows is not None:
            of_dense = bias if bias is None or self.dense_ids is None else bias.detach()[self.dense_ids]
            self.dense = DenseBlock(dense_rows, of_dense, self.rows_per_block, with_gradients, with_bias_gradient)
        self.grad_dense_rows = None if self.dense is None else self.dense.grad_rows

    def log_partition(self, hidden: Tensor, dense_hidden: Tensor) -> Tensor:
        """Compute log Z of R rows, (R,) float64."""
        parts = [] if self.shared is None else [self.shared.log_partition(hidden)]
        parts += [] if self.dense is None else [self.dense.softmax(dense_hidden).log_partition]
        return reduce(torch.logaddexp, parts)

    def block(self, labels: Tensor, ignore_index: int, hidden: Tensor | None, dense_hidden: Tensor | None) -> "_Block":
        """Compute the losses of R rows, and what their gradients take.

        Args:
            labels: (R,) token ids.
            ignore_index: the label of rows that do not count.
            hidden: (R, d) for the shared tokens, as the tables' columns; None without them.
            dense_hidden: (R, d) for those of the dense block; None without one.
        """
        if self.dense is None or dense_hidden is None:
            alone = self._shared_block(labels, ignore_index, hidden)
            return _Block(alone.losses, alone, None)
        counted = labels != ignore_index
        own_labels = torch.where(counted, labels, -1)
        if self.dense_ids is not None:
            places = self.structure.places[torch.where(counted, labels, 0)]
            own_labels = torch.where(counted, -1 - places, -1)
        own = self.dense.softmax(dense_hidden, own_labels)
        losses, shared, share, others = own.log_partition, None, counted, None
        if self.dense_ids is not None:
            shared_labels = torch.where(counted, places.clamp(min=-1), IGNORED)
            shared = self._shared_block(shared_labels, IGNORED, hidden, own.log_partition)
            losses, log_shared = shared.losses, shared.log_partition
            share, others = (
                torch.where(counted, share_of(*parts), 0.0)
                for parts in ((own.log_partition, log_shared), (log_shared, own.log_partition))
            )
        losses = torch.where(counted, losses - own.label_logits, 0.0)
        return _Block(losses, shared, _DenseRows(own, own_labels, share, others))

    def _shared_block(
        self, labels: Tensor, ignore_index: int, hidden: Tensor | None, others: Tensor | None = None
    ) -> "_TrieBlock | _FusedBlock":
        assert self.shared is not None and hidden is not None, "there are shared tokens"
        return self.shared.block(hidden, labels, ignore_index, others)

    def add_gradients_(
        self,
        block: "_Block",
        hidden: Tensor | None,
        dense_hidden: Tensor | None,
        grad_hidden: Tensor | None,
        grad_dense_hidden: Tensor | None,
    ) -> None:
        """Add a block to the gradients that are summed over blocks, and write those of its hidden rows, (R, d) each."""
        if block.shared is not None and self.shared is not None and hidden is not None and grad_hidden is not None:
            self.shared.add_gradients_(block.shared, hidden, grad_hidden)
        if block.dense is not None and self.dense is not None and dense_hidden is not None:
            assert grad_dense_hidden is not None, "the dense block's rows are an input of the loss"
            softmax, labels, share, others = block.dense
            self.dense.add_gradients_(dense_hidden, labels, softmax, share, others, grad_dense_hidden)

    def bias_gradient(self) -> Tensor | None:
        """Return the gradient of the bias, (N,): probability of each token minus the labels, summed over rows."""
        shared = None if self.shared is None else self.shared.bias_gradient()
        dense = None if self.dense is None else self.dense.grad_bias
        if shared is None or dense is None or self.dense_ids is None:
            return shared if dense is None else dense
        gradient = dense.new_empty(self.num_tokens).index_copy_(0, self.dense_ids.long(), dense)
        return gradient.index_copy_(0, self.structure.shared, shared)


class _BlockedLoss:
    """The shared tokens in one call of the loss over all its blocks of rows: cast tables and gradients being summed.

    Attributes:
        rows_per_block: R, the most rows of a block.
        grad_tables: of the summed loss; empty when no gradients are wanted.
    """

    def __init__(self, tables: tuple[Tensor, ...], num_rows: int, numbers_per_row: int, with_gradients: bool):
        # K = 1 is the plain decoder: its scores are N wide, and float64 would double their cost for nothing.
        self.score_dtype = torch.float64 if len(tables) > 1 else torch.float32
        self.score_tables = [table.detach().to(self.score_dtype) for table in tables]
        self.float_tables = [table.detach().float() for table in tables]
        self.widths = [table.shape[1] for table in tables]
        self.with_gradients = with_gradients
        self.grad_tables = _zeros_like(tables) if with_gradients else []
        self.rows_per_block = _rows_per_block(tables[0].device, num_rows, numbers_per_row)

    def log_partition(self, hidden: Tensor) -> Tensor:
        """Compute log Z over the shared tokens of R rows, (R,) float64."""
        raise NotImplementedError

    def block(self, hidden: Tensor, labels: Tensor, ignore_index: int, others: Tensor | None = None) -> Any:
        """Compute the losses of R rows, and what `add_gradients_` takes.

        Args:
            hidden: (R, d), as the tables' columns.
            labels: (R,) places among the shared tokens; with `others`, -1 where the label is one of theirs. A logit
                of 0 stands for such a label's.
            ignore_index: the label of rows that do not count.
            others: (R,) log Z of the tokens that stand beside, float64, or None.

        Returns:
            A `_TrieBlock` or `_FusedBlock`.
        """
        raise NotImplementedError

    def add_gradients_(self, block: Any, hidden: Tensor, grad_hidden: Tensor) -> None:
        """Add a block to the gradients of tables and bias, and write that of its hidden rows, (R, d)."""
        raise NotImplementedError

    def bias_gradient(self) -> Tensor | None:
        """Return the gradient of the bias, (N,): probability of each token minus the labels, summed over rows."""
        raise NotImplementedError

    def _add_score_grads_(self, score_grads: Sequence[Tensor], hidden: Tensor, grad_hidden: Tensor) -> None:
        """Carry the gradients by the scores, K matrices (R, M_k), on to the tables and the hidden rows."""
        parts = hidden.detach().float().split(self.widths, dim=1)
        grad_parts = grad_hidden.split(self.widths, dim=1)
        for k, score_grad in enumerate(score_grads):
            self.grad_tables[k].addmm_(score_grad.t(), parts[k])
            torch.mm(score_grad, self.float_tables[k], out=grad_parts[k])


def _loss_form(structure: CodeStructure) -> "type[_TrieLoss | _FusedLoss]":
    """Return the form of the loss over the shared tokens that their codes and device have."""
    return _TrieLoss if structure.fused is None else _FusedLoss


class _FusedBlock(NamedTuple):
    """The shared tokens in a block of R rows.

    Attributes:
        losses: (R,) float64.
        log_partition: (R,) log Z over the shared tokens, float64.
        softmax: with its workspaces.
        labels: (R,) any token where the row does not count.
        minus_ones: (R,) what each adds to the gradient of its bias.
        others_share: (R,) probability of the tokens that stand beside; None without them.
    """

    losses: Tensor
    log_partition: Tensor
    softmax: FusedSoftmax
    labels: Tensor
    minus_ones: Tensor
    others_share: Tensor | None


class _FusedLoss(_BlockedLoss):
    """The loss by the kernels of `FusedSoftmax`."""

    def __init__(
        self,
        structure: CodeStructure,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        num_rows: int,
        with_gradients: bool,
        with_bias_gradient: bool,
    ):
        assert structure.fused is not None
        self.contraction = structure.fused
        super().__init__(tables, num_rows, self.contraction.numbers_per_row, with_gradients)
        # Blocks of one size: a short last one would cost as much as a long one.
        blocks = max(1, -(-num_rows // self.rows_per_block))
        self.rows_per_block = self.contraction.round_up(-(-num_rows // blocks))
        self.weights = FusedWeights(self.contraction, bias)
        self.with_bias_gradient = with_bias_gradient
        self.grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and not num_rows else None

    def scores(self, hidden: Tensor) -> Tensor:
        """Compute the table scores of R rows next to each other, (R, sum of M_k)."""
        scores = hidden.new_empty((len(hidden), self.contraction.width), dtype=self.score_dtype)
        parts = hidden.detach().to(self.score_dtype).split(self.widths, dim=1)
        columns = scores.split(self.contraction.table_sizes, dim=1)
        for part, table, score in zip(parts, self.score_tables, columns, strict=True):
            torch.mm(part, table.t(), out=score)
        return scores

    def log_partition(self, hidden: Tensor) -> Tensor:
        """Do as _BlockedLoss.log_partition."""
        return FusedSoftmax(self.contraction, self.weights, self.scores(hidden)).log_partition

    def block(self, hidden: Tensor, labels: Tensor, ignore_index: int, others: Tensor | None = None) -> "_FusedBlock":
        """Do as _BlockedLoss.block."""
        softmax = FusedSoftmax(
            self.contraction, self.weights, self.scores(hidden), labels, ignore_index, self.with_gradients
        )
        losses, counted_labels, minus_ones = softmax.label_losses()
        log_shared, others_share = softmax.log_partition, None
        if others is not None:
            total = torch.logaddexp(log_shared, others)
            losses = losses + (total - log_shared)
            others_share = share_of(others, log_shared)
            if self.with_gradients:
                softmax.weigh_(total, share_of(log_shared, others))
        return _FusedBlock(losses, log_shared, softmax, counted_labels, minus_ones, others_share)

    def add_gradients_(self, block: "_FusedBlock", hidden: Tensor, grad_hidden: Tensor) -> None:
        """Do as _BlockedLoss.add_gradients_."""
        softmax, labels, minus_ones = block.softmax, block.labels, block.minus_ones
        if self.with_bias_gradient:
            gradient = softmax.bias_gradient().index_add_(0, labels, minus_ones)
            self.grad_bias = gradient if self.grad_bias is None else self.grad_bias + gradient
        score_grads = softmax.make_score_grads()
        if block.others_share is not None:  # minus the sum of all other probabilities, theirs too, stands at the label
            columns = (self.contraction.codes[labels] + self.contraction.offsets).long()
            minus_others = minus_ones * block.others_share.float()
            score_grads.scatter_add_(1, columns, minus_others.unsqueeze(1).expand(columns.shape))
        self._add_score_grads_(score_grads.split(self.contraction.table_sizes, dim=1), hidden, grad_hidden)

    def bias_gradient(self) -> Tensor | None:
        """Do as _BlockedLoss.bias_gradient."""
        return self.grad_bias


class _BlockSoftmax(NamedTuple):
    """The softmax of a block of R rows; all but the first only when gradients are wanted.

    Attributes:
        log_partition: (R,) log Z, float64.
        code_probs: K matrices (R, M_k), the probability of every code of every table.
        last_factor: (R, M_K) e_K.
        leaf_grads: (R, leaves) derivative of log Z by W of the leaves; with e_K it gives the gradient of the bias.
        fallback_token_probs: (N,) sums of the tokens' probabilities over the rows that underflowed.
    """

    log_partition: Tensor
    code_probs: list[Tensor]
    last_factor: Tensor | None
    leaf_grads: Tensor | None
    fallback_token_probs: list[Tensor]


class _TrieBlock(NamedTuple):
    """The shared tokens in a block of R rows.

    Attributes:
        losses: (R,) float64.
        log_partition: (R,) log Z over the shared tokens, float64.
        softmax: over them.
        labels: (R,) any token where `here` is false.
        label_codes: (R, K) their codes.
        here: (R,) whether the row counts and its label is a shared token; None: all.
        others_share: (R,) probability of the tokens that stand beside; None without them.
    """

    losses: Tensor
    log_partition: Tensor
    softmax: _BlockSoftmax
    labels: Tensor
    label_codes: Tensor
    here: Tensor | None
    others_share: Tensor | None


class _TrieLoss(_BlockedLoss):
    """The loss in torch, by the fold of the codes' trie."""

    def __init__(
        self,
        structure: CodeStructure,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        num_rows: int,
        with_gradients: bool,
        with_bias_gradient: bool,
    ):
        self.contraction = structure.unweighted if bias is None else structure.weighted
        super().__init__(tables, num_rows, self.contraction.numbers_per_row, with_gradients)
        self.codes = structure.shared_codes
        self.bias = None if bias is None else bias.detach().to(torch.float64)
        self.bias_max = 0.0 if self.bias is None else self.bias.max()
        self.weights = None if self.bias is None else (self.bias - self.bias_max).exp().float()
        self.fallback_grad_bias = torch.zeros_like(self.bias) if with_bias_gradient else None
        self.seen_labels: list[tuple[Tensor, Tensor]] = []  # with -1 for each that counts
        self.leaves = self.contraction.leaves(self.weights, self.rows_per_block, with_bias_gradient)

    def log_partition(self, hidden: Tensor) -> Tensor:
        """Do as _BlockedLoss.log_partition."""
        return self.softmax(self.scores(hidden), None).log_partition

    def block(self, hidden: Tensor, labels: Tensor, ignore_index: int, others: Tensor | None = None) -> "_TrieBlock":
        """Do as _BlockedLoss.block."""
        counted = here = None  # all rows, on the CPU
        if labels.device.type not in READ_BY_HOST:
            counted = here = labels != ignore_index
        if others is not None:
            here = labels >= 0
        if here is not None:
            labels = torch.where(here, labels, 0)
        scores, label_codes = self.scores(hidden), self.codes[labels].long()
        softmax = self.softmax(scores, counted, others)
        label_logits = self.gather_label_logits(scores, labels, label_codes)
        if here is not None and others is not None:
            label_logits = torch.where(here, label_logits, 0.0)
        total = softmax.log_partition if others is None else torch.logaddexp(softmax.log_partition, others)
        losses = total - label_logits
        if counted is not None:
            losses = torch.where(counted, losses, 0.0)
        others_share = None if others is None else share_of(others, softmax.log_partition)
        return _TrieBlock(losses, softmax.log_partition, softmax, labels, label_codes, here, others_share)

    def add_gradients_(self, block: "_TrieBlock", hidden: Tensor, grad_hidden: Tensor) -> None:
        """Do as _BlockedLoss.add_gradients_."""
        self._add_bias_gradient_(block)
        code_probs = block.softmax.code_probs
        to_score_grads_(code_probs, block.label_codes, block.here, block.others_share)
        self._add_score_grads_(code_probs, hidden, grad_hidden)

    def scores(self, hidden: Tensor) -> list[Tensor]:
        """Compute the table scores s_k of R rows: K matrices (R, M_k)."""
        parts = hidden.detach().to(self.score_dtype).split(self.widths, dim=1)
        return [part @ table.t() for part, table in zip(parts, self.score_tables, strict=True)]

    def softmax(self, scores: list[Tensor], counted: Tensor | None, others: Tensor | None = None) -> _BlockSoftmax:
        """Compute log Z of R rows and, when gradients are wanted, the probability of every code of every table.

        Args:
            scores: K matrices (R, M_k).
            counted: (R,) which rows count; the others have probabilities 0, and any log Z. None: all.
            others: (R,) log Z of the tokens that stand beside: they have their share of the probability, not of log Z.
        """
        maxima = [score.amax(dim=1, keepdim=True) for score in scores]
        factors = [(score - top).exp_().float() for score, top in zip(scores, maxima, strict=True)]
        folded = self.contraction.forward(factors, self.leaves)
        total = folded[-1].squeeze(1)
        log_partition = total.double().log() + torch.cat(maxima, dim=1).double().sum(dim=1) + self.bias_max
        enough = total >= SMALLEST_SUM
        underflowed = (~enough if counted is None else ~enough & counted).nonzero().squeeze(1)
        code_probs: list[Tensor] = []
        last_factor = leaf_grads = None
        if self.with_gradients:  # the probability of a code: its e_k times the derivative of log Z by e_k
            exact = enough if counted is None else enough & counted
            share = 1.0 if others is None else share_of(log_partition, others).float()
            inverse = torch.where(exact, share / total, 0.0).unsqueeze(1)
            gradients, leaf_grads = self.contraction.backward(factors, self.leaves, folded, inverse)
            code_probs = [gradient * e for gradient, e in zip(gradients, factors, strict=True)]
            last_factor = factors[-1]
        fallback_token_probs = []
        few_rows = max(1, FALLBACK_NUMBERS // len(self.codes))
        for few in underflowed.split(few_rows) if len(underflowed) else ():
            log_partition[few], token_probs = self._dense_fallback([score[few] for score in scores])
            if others is not None:
                token_probs *= share_of(log_partition[few], others[few]).unsqueeze(1)
            if self.with_gradients:
                fallback_token_probs.append(token_probs.sum(dim=0))
            for k, probs in enumerate(code_probs):
                exact = torch.zeros(len(few), probs.shape[1], dtype=torch.float64, device=probs.device)
                probs[few] = exact.index_add_(1, self.codes[:, k], token_probs).float()
        return _BlockSoftmax(log_partition, code_probs, last_factor, leaf_grads, fallback_token_probs)

    def _dense_fallback(self, scores: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute log Z, (R,), and the tokens' probabilities, (R, N), of a few rows from their N logits."""
        logits = sum(score[:, self.codes[:, k]] for k, score in enumerate(scores)).double()
        if self.bias is not None:
            logits = logits + self.bias
        log_partition = logits.logsumexp(dim=1)
        return log_partition, (logits - log_partition.unsqueeze(1)).exp_()

    def gather_label_logits(self, scores: list[Tensor], labels: Tensor, label_codes: Tensor) -> Tensor:
        """Return the logits of the labels, (R,), which have the codes (R, K)."""
        logits = torch.zeros((), dtype=torch.float64, device=labels.device)
        for k, score in enumerate(scores):
            logits = logits + score.gather(1, label_codes[:, k : k + 1]).squeeze(1)
        return logits if self.bias is None else logits + self.bias[labels]

    def _add_bias_gradient_(self, block: "_TrieBlock") -> None:
        """Add a block's probabilities of the tokens to the gradient of the bias, where that is wanted."""
        softmax = block.softmax
        if self.fallback_grad_bias is None or softmax.last_factor is None or softmax.leaf_grads is None:
            return
        self.leaves.add_gradient_(softmax.last_factor, softmax.leaf_grads)
        for token_probs in softmax.fallback_token_probs:
            self.fallback_grad_bias += token_probs
        counts = softmax.leaf_grads.new_full(block.labels.shape, 1.0) if block.here is None else block.here.float()
        self.seen_labels.append((block.labels, -counts))

    def bias_gradient(self) -> Tensor | None:
        """Do as _BlockedLoss.bias_gradient."""
        if self.fallback_grad_bias is None or self.weights is None:
            return None
        gradient = self.leaves.weights_gradient().mul_(self.weights)
        gradient = gradient + self.fallback_grad_bias.float()
        for labels, minus_ones in self.seen_labels:
            gradient.index_add_(0, labels, minus_ones)
        return gradient


def to_score_grads_(
    code_probs: list[Tensor], label_codes: Tensor, here: Tensor | None = None, others_share: Tensor | None = None
) -> None:
    """Turn the probabilities of the codes, K matrices (R, M_k), into the gradients of the scores: p - 1 at labels.

    p - 1 is computed as minus the sum of the others: without cancellation where the model is nearly sure.

    Args:
        code_probs: of a block, overwritten.
        label_codes: (R, K) codes of the labels.
        here: (R,) whether the label is one of these tokens, where others stand beside.
        others_share: (R,) their probability, or None.
    """
    for k, probs in enumerate(code_probs):
        code = label_codes[:, k : k + 1]
        unlabelled = None if others_share is None else probs.gather(1, code)
        probs.scatter_(1, code, 0.0)
        at_label = -probs.sum(dim=1, keepdim=True)
        if here is not None and others_share is not None and unlabelled is not None:
            at_label = torch.where(here.unsqueeze(1), at_label - others_share.float().unsqueeze(1), unlabelled)
        probs.scatter_(1, code, at_label)
