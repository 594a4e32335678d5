"""SubEmbedding: K small tables and a code per token in place of an N x d embedding (paper §3.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksub_ds.codes.table import CodeTable, table_widths
from ksub_ds.contraction.code_structure import CodeStructure


class SubEmbedding(nn.Module):
    """Drop-in for `nn.Embedding`: e_n = concat over k of E_k[f_k(n)].

    Args:
        table: the codes; K = 1 with M = N is a plain embedding.
        embedding_dim: d; the first d mod K tables are one wider.
        padding_idx: token whose lookups send no gradient, as in `nn.Embedding`.
        mixing: keep a fixed (d, d) matrix A and embed e_n = A · concat over k of E_k[f_k(n)]. It comes with
            tables fitted to another model's embedding (ksub_ds/convert/fitting.py); a new layer has the identity.

    The tables E_k (M_k, d_k) are exactly `parameters()`. The codes, (N, K) int32, and A, if there is one,
    are the persistent buffers; `structure` is derived from the codes when first needed. Replace the codes by
    assigning another tensor or by load_state_dict, not in place.
    """

    codes: Tensor
    mixing: Tensor | None

    def __init__(self, table: CodeTable, embedding_dim: int, padding_idx: int | None = None, mixing: bool = False):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.table_sizes = table.table_sizes
        self.widths = table_widths(embedding_dim, table.num_tables)
        self.register_buffer("codes", torch.tensor(table.codes))
        self.register_buffer("mixing", torch.eye(embedding_dim) if mixing else None)
        self.tables = nn.ParameterList(
            torch.empty(size, width) for size, width in zip(self.table_sizes, self.widths, strict=True)
        )
        self._structure: CodeStructure | None = None
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        """The number of tokens, N."""
        return self.codes.shape[0]

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the tables from a normal distribution (BERT's 0.02)."""
        for table in self.tables:
            nn.init.normal_(table, std=std)

    def code_table(self) -> CodeTable:
        """Return the codes as a `CodeTable`."""
        return CodeTable(self.codes.cpu().numpy(), self.table_sizes)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (...) token ids: (..., d)."""
        codes = F.embedding(ids, self.codes)  # checks the range, where indexing would read -1 as the last token
        embedded = torch.cat([F.embedding(codes[..., k], table) for k, table in enumerate(self.tables)], dim=-1)
        if self.mixing is not None:
            embedded = embedded @ self.mixing.t().to(embedded.dtype)  # ZeRO 3 casts parameters, not buffers
        if self.padding_idx is not None and embedded.requires_grad:
            embedded = torch.where((ids == self.padding_idx).unsqueeze(-1), embedded.detach(), embedded)
        return embedded

    def dense_weight(self) -> Tensor:
        """Return the (N, d) matrix that this layer stands for."""
        rows = torch.cat([table[self.codes[:, k]] for k, table in enumerate(self.tables)], dim=1)
        return rows if self.mixing is None else rows @ self.mixing.t().to(rows.dtype)

    def to_tables(self, hidden: Tensor) -> Tensor:
        """Turn (..., d) decoder inputs to the columns of the tables: h · (A c) = (A^T h) · c."""
        return hidden if self.mixing is None else hidden @ self.mixing.to(hidden.dtype)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute all N logits, (..., N), as sums of table scores; for a few rows, since N is wide."""
        parts = self.to_tables(hidden).split(self.widths, dim=-1)
        scores = [part @ table.t() for part, table in zip(parts, self.tables, strict=True)]
        total = scores[0].index_select(-1, self.codes[:, 0])  # ONNX gathers by int32 here, but not by [...]
        for k, score in enumerate(scores[1:], start=1):
            total = total + score.index_select(-1, self.codes[:, k])
        return total if bias is None else total + bias

    @torch.no_grad()
    def predict_topk(self, hidden: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k largest of `logits(hidden, bias)`, exactly, without building them.

        Args:
            hidden: (B, d) decoder inputs.
            k: how many, 1 <= k <= N.
            bias: (N,) or None.

        Returns:
            (B, k) logits in falling order and (B, k) token ids.

        Raises:
            ValueError: k is out of range.
        """
        if not 1 <= k <= self.num_embeddings:
            raise ValueError(f"k must lie in 1..{self.num_embeddings}, not {k}")
        if k == 1:
            best, token = self.most_probable(hidden, bias)
            return best.unsqueeze(1), token.unsqueeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self._scores(self.to_tables(hidden.float()))
            return self.structure.search(scores, None if bias is None else bias.float(), k)

    @torch.no_grad()
    def most_probable(self, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the largest of `logits(hidden, bias)`, exactly, at a cost that does not depend on them.

        Args:
            hidden: (B, d) decoder inputs.
            bias: (N,) or None.

        Returns:
            (B,) logits and (B,) token ids; of equal ones always the same.
        """
        fold = self.structure.best_unweighted if bias is None else self.structure.best_weighted
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if bias is None else bias.float()
            leaf_bias = [] if bias is None else fold.leaf_bias(bias)
            blocks = self.to_tables(hidden.float()).split(fold.rows_per_block)
            found = [fold(self._scores(rows), bias, leaf_bias) for rows in blocks]
        return torch.cat([logits for logits, _ in found]), torch.cat([ids for _, ids in found])

    def _scores(self, hidden: Tensor) -> list[Tensor]:
        """Compute the table scores of (B, d) float32 rows, split as the tables: K matrices (B, M_k)."""
        parts = hidden.split(self.widths, dim=1)
        return [part @ table.float().t() for part, table in zip(parts, self.tables, strict=True)]

    @property
    def structure(self) -> CodeStructure:
        """The trie of the current codes, and what is computed over it."""
        if self._structure is None or self._structure.codes is not self.codes:  # moved to a device, or replaced
            self._structure = CodeStructure(self.codes, self.table_sizes)
        return self._structure

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        guard = state_dict.get(f"{prefix}weight")
        if guard is not None and not guard.numel():  # what SubEmbeddingModel.save_pretrained adds; any other is wrong
            state_dict = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._structure = None  # the codes may have been overwritten in place

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # asked for by code that takes every embedding for an N x d matrix
            raise AttributeError(
                "a SubEmbedding has no `weight`: tokens share the rows of its `tables`, so no token has one to itself "
                "(PEFT's trainable_token_indices included); dense_weight() returns a copy of the N x d matrix"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Describe the sizes, for `repr`."""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, tables={self.table_sizes}"
