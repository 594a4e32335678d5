"""Learning a teacher's whole distribution without N-wide logits of the student.

With p the teacher's softmax at a position and logit(n) = sum over k of s_k[f_k(n)] + b_n the student's,

    CE(p, student) = log Z - sum over k of s_k · P_k - p · b,        P_k[c] = sum of p_n over the tokens with f_k(n) = c

since the expectation of a sum is the sum of the expectations: the teacher's distribution is needed only through its
K marginals over codes, sum of M_k numbers a position, and through sum over positions of p, N numbers in all. log Z is
the exact one of softmax.py. Subtracting the teacher's entropy makes it the Kullback-Leibler divergence. Nothing is
sampled, and nothing cut off after the best k tokens.

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

BLOCK_NUMBERS = 2**24  # teacher's logits held at a time


class SoftTargets(NamedTuple):
    """A teacher's distributions at P positions, as far as a student over sub-embeddings needs them.

    Attributes:
        marginals: (P, sum of M_k) probability of every code of every table.
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
        model: Any = open_model(name)
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

    @torch.no_grad()
    def targets(
        self, input_ids: Tensor, masked_positions: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> SoftTargets:
        """Predict at places in a flattened batch, as the model that learns does.

        Args:
            input_ids: (batch, length) token ids.
            masked_positions: (P,) places in the flattened batch x length.
            targets: (P,) labels; those that are -100 only fill up, and their rows are zero.
            attention_mask: (batch, length), 0 at padding.
        """
        if isinstance(self.model, SubMaskedLM):
            states = self.model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
            states = self.model._decoder_input(states.flatten(0, 1)[masked_positions])
        else:
            states = self.model(input_ids, attention_mask=attention_mask).logits.flatten(0, 1)[masked_positions]
        counts = (targets != -100).unsqueeze(1).float()
        marginals = states.new_zeros(len(states), self.width, dtype=torch.float32)
        totals = states.new_zeros(self.num_tokens, dtype=torch.float32)
        entropy = states.new_zeros((), dtype=torch.float64)
        rows = max(1, BLOCK_NUMBERS // self.num_tokens)
        for start in range(0, len(states), rows):
            logits = nn.functional.linear(states[start : start + rows], self.weight, self.bias).float()
            log_probability = logits.log_softmax(dim=1)
            probability = log_probability.exp() * counts[start : start + rows]
            entropy -= (probability * log_probability).sum().double()
            totals += probability.sum(dim=0)
            for column in self.columns:
                marginals[start : start + rows].index_add_(1, column, probability)
        return SoftTargets(marginals, totals, entropy.float())


class _Identity(nn.Module):
    """A decoder that returns its input."""

    bias = None

    def forward(self, states: Tensor) -> Tensor:
        return states
