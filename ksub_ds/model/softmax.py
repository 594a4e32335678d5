"""The exact softmax over all N tokens, without N logits (docs/softmax.md derives it).

The logit of token n is a sum of K table scores and a bias, so exp(logit) is a product of K factors:

    s_k = h_k · E_k^T                        (B, M_k): h split into K parts, one small product per table
    logit_n = s_1[f_1(n)] + ... + s_K[f_K(n)] + b_n
    log Z = log sum_n exp(b_n) · prod_k e_k[f_k(n)] + sum_k max s_k,      e_k = exp(s_k - max s_k)

The sum is the `Contraction` of the codes' trie: no (B, N), no (N, d). The gradient with respect to
s_k[c] is the probability that code c is the k-th of the predicted token, which the same fold run
backwards gives. Loss and gradients are made block by block of rows, in one pass, so that nothing
but the gradients themselves outlives a block.

Scores, their maxima and their exponents are taken in float64 (they are small), sums in float32.
When the maxima of the K tables meet in no token, Z underflows; rows with Z < 1e-25 are summed again
over explicit logits, a few rows at a time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ksub_ds.model.embedding import SubEmbedding

SMALLEST_SUM = 1e-25  # under this, float32 terms of Z begin to vanish
BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**28}  # numbers of the widest level or table held per block
FEWEST_ROWS = 64  # fewer would read the plain decoder's N x d table too often
FALLBACK_NUMBERS = 2**20  # float64 logits per block of the underflow path


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
        layer: the tied sub-embedding; its tables receive gradients.
        labels: (...) token ids.
        bias: (N,) or None.
        ignore_index: the label of rows that do not count.
        reduction: "mean" over the labelled rows (nan when there are none, as torch's), or "sum".

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError: shapes that do not fit, a label out of range, an unknown reduction.
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
    labels = labels.reshape(-1)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    hidden_BD = hidden.reshape(-1, hidden.shape[-1])
    if len(kept) != len(labels):
        hidden_BD, labels = hidden_BD[kept], labels[kept]
    on_cpu = labels.device.type == "cpu"  # a GPU checks its own indices; asking it here would wait for it
    if on_cpu and len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_tokens):
        raise ValueError(f"labels must be {ignore_index} or token ids in [0, {num_tokens})")
    with torch.autocast(hidden.device.type, enabled=False):  # sums are float32 whatever the rest of the model is
        hidden_BD = layer.to_tables(hidden_BD)
        loss = _SummedLoss.apply(hidden_BD, bias, labels, layer, torch.is_grad_enabled(), *layer.tables)
    return loss / len(labels) if reduction == "mean" else loss


@torch.no_grad()
def log_partition(hidden: Tensor, layer: SubEmbedding, bias: Tensor | None = None) -> Tensor:
    """Compute log Z of every row: (B, d) decoder inputs -> (B,) float64. No gradient."""
    with torch.autocast(hidden.device.type, enabled=False):
        run = _BlockedLoss(
            layer, tuple(layer.tables), bias, len(hidden), with_gradients=False, with_bias_gradient=False
        )
        blocks = layer.to_tables(hidden).split(run.rows_per_block)
        return torch.cat([run.log_partition_and_code_probs(run.scores(rows)).log_partition for rows in blocks])


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' negative log-likelihoods; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        layer: SubEmbedding,
        with_gradients: bool,
        *tables: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        with_gradients = with_gradients and any(needs)
        run = _BlockedLoss(layer, tables, bias, len(labels), with_gradients, with_gradients and needs[1])
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_gradients else None
        for start in range(0, len(labels), run.rows_per_block):
            rows = slice(start, start + run.rows_per_block)
            scores, label_codes = run.scores(hidden[rows]), run.codes[labels[rows]].long()
            block = run.log_partition_and_code_probs(scores)
            loss += (block.log_partition - run.gather_label_logits(scores, labels[rows], label_codes)).sum()
            if grad_hidden is not None:
                run.add_bias_gradient_(block)
                to_score_grads_(block.code_probs, label_codes)
                run.add_gradients_(hidden[rows], block.code_probs, grad_hidden[rows])
        if with_gradients:
            ctx.gradients = (grad_hidden, run.bias_gradient(labels), None, None, None, *run.grad_tables)
            ctx.dtypes = [getattr(tensor, "dtype", None) for tensor in (hidden, bias, None, None, None, *tables)]
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        triples = zip(ctx.gradients, ctx.dtypes, ctx.needs_input_grad, strict=True)
        return tuple(
            (gradient * grad_output).to(dtype) if gradient is not None and needed else None
            for gradient, dtype, needed in triples
        )


class _BlockSoftmax(NamedTuple):
    """The softmax of a block of R rows; all but the first only when gradients are wanted.

    Attributes:
        log_partition: (R,) log Z, float64.
        code_probs: K matrices (R, M_k), the probability of every code of every table.
        last_factor: (R, M_K) e_K, and
        leaf_grads: (R, leaves) derivative of log Z by W of the leaves: together they give the gradient of the bias.
        fallback_token_probs: (N,) sums of the tokens' probabilities over the rows that underflowed.
    """

    log_partition: Tensor
    code_probs: list[Tensor]
    last_factor: Tensor | None
    leaf_grads: Tensor | None
    fallback_token_probs: list[Tensor]


class _BlockedLoss:
    """One call of the loss over all its blocks: cast tables, leaf matrix, gradients being summed."""

    def __init__(
        self,
        layer: SubEmbedding,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        num_rows: int,
        with_gradients: bool,
        with_bias_gradient: bool,
    ):
        self.contraction = layer.structure.unweighted if bias is None else layer.structure.weighted
        self.codes = layer.codes
        # K = 1 is the plain decoder: its scores are N wide, and float64 would double their cost for nothing.
        self.score_dtype = torch.float64 if len(tables) > 1 else torch.float32
        self.tables = [table.detach().to(self.score_dtype) for table in tables]
        self.widths = [table.shape[1] for table in tables]
        self.grad_tables = [torch.zeros_like(table, dtype=torch.float32) for table in tables] if with_gradients else []
        self.with_gradients = with_gradients
        self.bias = None if bias is None else bias.detach().to(torch.float64)
        self.bias_max = 0.0 if self.bias is None else self.bias.max()
        weights = None if self.bias is None else (self.bias - self.bias_max).exp().float()
        self.weights = weights
        self.fallback_grad_bias = torch.zeros_like(self.bias) if with_bias_gradient else None
        numbers = BLOCK_NUMBERS.get(self.codes.device.type, BLOCK_NUMBERS["cpu"])
        rows = max(FEWEST_ROWS, numbers // self.contraction.numbers_per_row)
        self.rows_per_block = max(1, min(num_rows, rows))
        self.leaves = self.contraction.leaves(weights, self.rows_per_block, with_bias_gradient)

    def scores(self, hidden: Tensor) -> list[Tensor]:
        """Compute the table scores s_k of R rows: K matrices (R, M_k)."""
        parts = hidden.detach().to(self.score_dtype).split(self.widths, dim=1)
        return [part @ table.t() for part, table in zip(parts, self.tables, strict=True)]

    def log_partition_and_code_probs(self, scores: list[Tensor]) -> _BlockSoftmax:
        """Compute log Z of R rows and, when gradients are wanted, the probability of every code of every table."""
        maxima = [score.amax(dim=1, keepdim=True) for score in scores]
        factors = [(score - top).exp_().float() for score, top in zip(scores, maxima, strict=True)]
        folded = self.contraction.forward(factors, self.leaves)
        total = folded[-1].squeeze(1)
        log_partition = total.double().log() + torch.cat(maxima, dim=1).double().sum(dim=1) + self.bias_max
        underflowed = (~(total >= SMALLEST_SUM)).nonzero().squeeze(1)
        code_probs: list[Tensor] = []
        last_factor = leaf_grads = None
        if self.with_gradients:  # the probability of a code: its e_k times the derivative of log Z by e_k
            inverse = torch.where(total >= SMALLEST_SUM, 1.0 / total, 0.0).unsqueeze(1)
            gradients, leaf_grads = self.contraction.backward(factors, self.leaves, folded, inverse)
            code_probs = [gradient * e for gradient, e in zip(gradients, factors, strict=True)]
            last_factor = factors[-1]
        fallback_token_probs = []
        few_rows = max(1, FALLBACK_NUMBERS // len(self.codes))
        for few in underflowed.split(few_rows) if len(underflowed) else ():
            log_partition[few], token_probs = self._dense_fallback([score[few] for score in scores])
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

    def add_gradients_(self, hidden: Tensor, score_grads: list[Tensor], grad_hidden: Tensor) -> None:
        """Add this block to the tables' gradients and write the gradient of its hidden rows, (R, d)."""
        parts = hidden.detach().float().split(self.widths, dim=1)
        grad_parts = grad_hidden.split(self.widths, dim=1)
        for k, score_grad in enumerate(score_grads):
            self.grad_tables[k].addmm_(score_grad.t(), parts[k])
            torch.mm(score_grad, self.tables[k].float(), out=grad_parts[k])

    def add_bias_gradient_(self, block: _BlockSoftmax) -> None:
        """Add this block's probabilities of the tokens to the gradient of the bias, where that is wanted."""
        if self.fallback_grad_bias is None or block.last_factor is None or block.leaf_grads is None:
            return
        self.leaves.add_gradient_(block.last_factor, block.leaf_grads)
        for token_probs in block.fallback_token_probs:
            self.fallback_grad_bias += token_probs

    def bias_gradient(self, labels: Tensor) -> Tensor | None:
        """Return the gradient of the bias, (N,): probability of each token minus the labels, summed over rows."""
        if self.fallback_grad_bias is None or self.weights is None:
            return None
        gradient = self.leaves.weights_gradient().mul_(self.weights)
        gradient = gradient + self.fallback_grad_bias.float()
        return gradient.index_add_(0, labels, gradient.new_full(labels.shape, -1.0))


def to_score_grads_(code_probs: list[Tensor], label_codes: Tensor) -> None:
    """Turn the probabilities of the codes, K matrices (R, M_k), into the gradients of the scores: p - 1 at labels.

    p - 1 is computed as minus the sum of the others: without cancellation where the model is nearly sure.
    """
    for k, probs in enumerate(code_probs):
        code = label_codes[:, k : k + 1]
        probs.scatter_(1, code, 0.0)
        probs.scatter_(1, code, -probs.sum(dim=1, keepdim=True))
