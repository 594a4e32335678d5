"""Learning a teacher's whole distribution without N-wide logits of the student.

With p the teacher's softmax at a position and logit(n) = sum over k of s_k[f_k(n)] + b_n the student's,

    CE(p, student) = log Z - sum over k of s_k · P_k - p · b,        P_k[c] = sum of p_n over the tokens with f_k(n) = c

since the expectation of a sum is the sum of the expectations: the teacher's distribution is needed only through its
K marginals over codes, sum of M_k numbers a position, and through sum over positions of p, N numbers in all. log Z is
the exact one of softmax.py. Subtracting the teacher's entropy makes it the Kullback-Leibler divergence. Nothing is
sampled, and nothing cut off after the best k tokens. Where tokens are dedicated, their rows R_n are one table more, of
which no other token has a row: its scores are h · R_n, its marginals the p_n themselves.

Where there is a label too, CE(label, student) has the same log Z, so both losses cost one pass:

    (1 - w) · CE + w · KL  =  CE + w · (sum over k of s_k · (1[f_k(label)] - P_k) + b_label - p · b - H(p))
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.model.loading import open_model
from ksub_ds.model.masked_lm import SubMaskedLM
from ksub_ds.model.replacement import embedding_matrix

TEACHER_LOGITS = {"cpu": 2**24, "cuda": 2**28}  # held at a time


class SoftTargets(NamedTuple):
    """A teacher's distributions at P positions, as far as a student over sub-embeddings needs them.

    Attributes:
        marginals: (P, sum of M_k + F) probability of every code of every table, then of every dedicated token.
        totals: (N,) sum over the positions of the probability of each token.
        entropy: () sum over the positions of the distribution's entropy, nats.
    """

    marginals: Tensor
    totals: Tensor
    entropy: Tensor


class Teacher:
    """A frozen masked language model of the same tokens.

    Args:
        name: folder or Hub name of a plain model (the families of `replace_embeddings`), or of one of ours.
        table: the student's codes.
        device: where it runs.

    Raises:
        UserError: it cannot be read, predicts no masked tokens, or has fewer tokens than the codes.
    """

    def __init__(self, name: str | Path, table: CodeTable, device: Any = "cpu"):
        model: Any = open_model(name).float()  # a distribution of bf16 logits is not its own
        if not type(model).__name__.endswith("ForMaskedLM"):
            raise UserError(f"--distill-from {name}: is a {type(model).__name__}, which predicts no masked tokens")
        if model.config.vocab_size < table.num_tokens:
            raise UserError(
                f"--distill-from {name}: has {model.config.vocab_size:,} tokens, the codes {table.num_tokens:,}; "
                "give a teacher with the same tokenizer"
            )
        self.num_tokens = table.num_tokens
        try:
            self.weight = embedding_matrix(model)[: self.num_tokens].to(device)
        except ValueError as error:
            raise UserError(f"--distill-from {name}: {error}") from error
        bias = model.decoder_bias if isinstance(model, SubMaskedLM) else model.get_output_embeddings().bias
        self.bias = None if bias is None else bias.detach()[: self.num_tokens].to(device)
        if not isinstance(model, SubMaskedLM):
            model.set_output_embeddings(_Identity())  # its "logits" are now the decoder's inputs
        self.model = model.to(device).eval().requires_grad_(False)
        self.columns: list[Tensor] = []  # of each table: where its codes stand among all tables', by token
        self.width = 0
        for column, size in zip(table.codes.T, table.table_sizes, strict=True):
            self.columns.append((torch.tensor(column).long() + self.width).to(device))
            self.width += size
        self.dedicated = torch.tensor(table.dedicated).long().to(device)
        self.width += table.num_dedicated

    @torch.no_grad()
    def targets(
        self, input_ids: Tensor, masked_positions: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> SoftTargets:
        """Predict at chosen positions of a batch.

        Args:
            input_ids: (batch, length) token ids.
            masked_positions: (P,) places in the flattened batch x length.
            targets: (P,) token ids; -100 at places that only fill P up: there the teacher predicts nothing.
            attention_mask: (batch, length), 0 at padding.

        Returns:
            Its distributions, in the order of the positions.
        """
        if isinstance(self.model, SubMaskedLM):
            states = self.model._decoder_input_at(input_ids, masked_positions, attention_mask)
        else:
            states = self.model(input_ids, attention_mask=attention_mask).logits.flatten(0, 1)
            states = states.index_select(0, masked_positions)
        counts = (targets != -100).float().unsqueeze(1)
        marginals = states.new_zeros(len(states), self.width, dtype=torch.float32)
        totals = states.new_zeros(self.num_tokens, dtype=torch.float32)
        entropy = states.new_zeros((), dtype=torch.float64)
        rows = max(1, TEACHER_LOGITS.get(states.device.type, TEACHER_LOGITS["cpu"]) // self.num_tokens)
        for start in range(0, len(states), rows):
            block = slice(start, start + rows)
            logits = nn.functional.linear(states[block], self.weight, self.bias).float()
            log_probability = logits.log_softmax(dim=1)
            probability = log_probability.exp() * counts[block]
            entropy -= (probability * log_probability).sum().double()
            totals += probability.sum(dim=0)
            for column in self.columns:
                marginals[block].index_add_(1, column, probability)
            if len(self.dedicated):
                marginals[block, -len(self.dedicated) :] = probability[:, self.dedicated]
        return SoftTargets(marginals, totals, entropy.float())


class _Identity(nn.Module):
    """A decoder that returns its input."""

    bias = None

    def forward(self, states: Tensor) -> Tensor:
        return states
