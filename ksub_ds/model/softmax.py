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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ksub_ds.model.contraction import Contraction

if TYPE_CHECKING:
    from ksub_ds.model.embedding import SubEmbedding

SMALLEST_SUM = 1e-25  # under this, float32 terms of Z begin to vanish
BLOCK_NUMBERS = {"cpu": 2**21, "cuda": 2**28}  # numbers of the widest level or table held per block
FEWEST_ROWS = 64  # fewer would read the plain decoder's N x d table too often
FALLBACK_NUMBERS = 2**20  # float64 logits per block of the underflow path


def factorized_cross_entropy(
    hidden: Tensor,
    layer: "SubEmbedding",
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(hidden @ layer.dense_weight().T + bias, labels)`, exactly, without the logits.

    Args:
        hidden: (..., d) decoder inputs, any float type; sums are in float32.
        layer: the tied sub-embedding; its tables receive gradients.
        labels: (...) token ids; rows with `ignore_index` count for nothing.
        bias: (N,) or None.
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
def log_partition(hidden: Tensor, layer: "SubEmbedding", bias: Tensor | None = None) -> Tensor:
    """log Z of every row: (B, d) decoder inputs -> (B,) float64. No gradient."""
    with torch.autocast(hidden.device.type, enabled=False):
        run = _Pass(layer, tuple(layer.tables), bias, len(hidden), with_gradients=False, with_bias_gradient=False)
        blocks = [run.scores(rows) for rows in layer.to_tables(hidden).split(run.rows_per_block)]
        return torch.cat([run.log_total_and_residuals(scores)[0] for scores in blocks])


class _SummedLoss(torch.autograd.Function):
    """Sum of the rows' negative log-likelihoods; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        layer: "SubEmbedding",
        with_gradients: bool,
        *tables: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        with_gradients = with_gradients and any(needs)
        run = _Pass(layer, tables, bias, len(labels), with_gradients, with_gradients and needs[1])
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_gradients else None
        for start in range(0, len(labels), run.rows_per_block):
            rows = slice(start, start + run.rows_per_block)
            scores = run.scores(hidden[rows])
            log_total, residuals = run.log_total_and_residuals(scores)
            loss += (log_total - run.subtract_labels(scores, residuals, labels[rows])).sum()
            if grad_hidden is not None:
                run.add_gradients(hidden[rows], residuals, grad_hidden[rows])
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


class _Pass:
    """One call of the loss over all its blocks: cast tables, leaf matrix, gradients being summed."""

    def __init__(
        self,
        layer: "SubEmbedding",
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        num_rows: int,
        with_gradients: bool,
        with_bias_gradient: bool,
    ):
        self.contraction: Contraction = layer.contraction(weighted=bias is not None)
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
        """Table scores s_k of R rows: K matrices (R, M_k)."""
        parts = hidden.detach().to(self.score_dtype).split(self.widths, dim=1)
        return [part @ table.t() for part, table in zip(parts, self.tables, strict=True)]

    def log_total_and_residuals(self, scores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """log Z of R rows, float64, and (when gradients are wanted) the probability of every code of every table."""
        maxima = [score.amax(dim=1, keepdim=True) for score in scores]
        factors = [(score - top).exp_().float() for score, top in zip(scores, maxima, strict=True)]
        folded = self.contraction.forward(factors, self.leaves)
        total = folded[-1].squeeze(1)
        log_total = total.double().log() + torch.cat(maxima, dim=1).double().sum(dim=1) + self.bias_max
        underflowed = (~(total >= SMALLEST_SUM)).nonzero().squeeze(1)
        residuals = self._residuals(factors, folded, total) if self.with_gradients else []
        few_rows = max(1, FALLBACK_NUMBERS // len(self.codes))
        for few in underflowed.split(few_rows) if len(underflowed) else ():
            log_total[few], few_residuals = self._explicit([score[few] for score in scores])
            for residual, replacement in zip(residuals, few_residuals, strict=False):
                residual[few] = replacement
        return log_total, residuals

    def subtract_labels(self, scores: list[Tensor], residuals: list[Tensor], labels: Tensor) -> Tensor:
        """Logits of the labels, (R,); the residuals become p - 1 at the labels' codes."""
        label_codes = self.codes[labels].long()
        logit = torch.zeros((), dtype=torch.float64, device=labels.device)
        for k, score in enumerate(scores):
            logit = logit + score.gather(1, label_codes[:, k : k + 1]).squeeze(1)
        for k, residual in enumerate(residuals):
            code = label_codes[:, k : k + 1]
            # p - 1 as minus the sum of the others: without cancellation where the model is nearly sure.
            residual.scatter_(1, code, 0.0)
            residual.scatter_(1, code, -residual.sum(dim=1, keepdim=True))
        return logit if self.bias is None else logit + self.bias[labels]

    def _residuals(self, factors: list[Tensor], folded: list[Tensor], total: Tensor) -> list[Tensor]:
        """Probability of every code of every table, (R, M_k): e_k times the derivative of log Z by e_k."""
        inverse = torch.where(total >= SMALLEST_SUM, 1.0 / total, 0.0).unsqueeze(1)
        gradients = self.contraction.backward(factors, self.leaves, folded, inverse)
        return [gradient * e for gradient, e in zip(gradients, factors, strict=True)]

    def _explicit(self, scores: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """log Z and code probabilities of a few rows from their N logits (after an underflow)."""
        logits = sum(score[:, self.codes[:, k]] for k, score in enumerate(scores)).double()
        if self.bias is not None:
            logits = logits + self.bias
        log_total = logits.logsumexp(dim=1)
        if not self.with_gradients:
            return log_total, []
        probability = (logits - log_total.unsqueeze(1)).exp_()
        if self.fallback_grad_bias is not None:
            self.fallback_grad_bias += probability.sum(dim=0)
        return log_total, [
            torch.zeros_like(score, dtype=torch.float64).index_add_(1, self.codes[:, k], probability).float()
            for k, score in enumerate(scores)
        ]

    def add_gradients(self, hidden: Tensor, residuals: list[Tensor], grad_hidden: Tensor) -> None:
        """Add this block to the tables' gradients and write the gradient of its hidden rows, (R, d)."""
        parts = hidden.detach().float().split(self.widths, dim=1)
        grad_parts = grad_hidden.split(self.widths, dim=1)
        for k, residual in enumerate(residuals):
            self.grad_tables[k].addmm_(residual.t(), parts[k])
            torch.mm(residual, self.tables[k].float(), out=grad_parts[k])

    def bias_gradient(self, labels: Tensor) -> Tensor | None:
        """Gradient of the bias, (N,): probability of each token minus the labels, summed over rows."""
        if self.fallback_grad_bias is None or self.weights is None:
            return None
        gradient = self.leaves.weights_gradient().mul_(self.weights)
        gradient = gradient + self.fallback_grad_bias.float()
        return gradient.index_add_(0, labels, gradient.new_full(labels.shape, -1.0))
