"""SubEmbedding: K small tables and a code per token in place of an N x d embedding (paper §3.1)."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksub_ds.codes.packing import unpack
from ksub_ds.codes.table import CodeTable, table_widths
from ksub_ds.contraction.code_structure import CodeStructure
from ksub_ds.contraction.dense_block import DenseBlock
from ksub_ds.contraction.precision import exact_products, without_autocast

NO_DECODER = "tokens share codes in an input-only embedding, so none can be predicted; compress without --input-only"
MANY_TABLES = 8  # from here on, tables of one shape are looked up together


class SubEmbedding(nn.Module):
    """Drop-in for `nn.Embedding`: e_n = A · concat over k of E_k[f_k(n)], and + R_n for the dedicated tokens.

    Args:
        table: the codes; K = 1 with M = N is a plain embedding.
        embedding_dim: d; the first d mod K tables are one wider.
        padding_idx: token whose lookups send no gradient, as in `nn.Embedding`; -1 is the last. One beyond N - 1, as
            a configuration may name for a smaller vocabulary, is none of them.
        mixing: keep the fixed (d, d) matrix A. It comes with tables fitted to another model's embedding
            (ksub_ds/convert/fitting.py); a new layer has the identity. Without, there is none.

    The tables E_k (M_k, d_k) and R, `dedicated_rows` (F, d), zero in a new layer, are exactly `parameters()`. The
    codes, (N, K) int32, the ids of the `dedicated` tokens, (F,) int32, and A are the persistent buffers. What there is
    none of is None: R and the ids for F = 0, A without `mixing`. `structure` is derived from codes and ids when first
    needed. Replace these by assigning another tensor or by load_state_dict, not in place.

    Where codes may repeat (`input_only`) there are no logits, and codes of up to 256 rows are packed, (N, bytes) uint8
    (codes/packing.py), and a lookup takes its codes out.
    """

    codes: Tensor
    dedicated: Tensor | None
    dedicated_rows: nn.Parameter | None
    mixing: Tensor | None

    def __init__(self, table: CodeTable, embedding_dim: int, padding_idx: int | None = None, mixing: bool = False):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        if padding_idx is not None and padding_idx < 0:
            self.padding_idx = padding_idx + table.num_tokens
        self.table_sizes = table.table_sizes
        self.widths = table_widths(embedding_dim, table.num_tables)
        self.input_only = not table.unique
        self.code_bits = table.stored_bits  # 32: not packed
        self.register_buffer("codes", torch.tensor(table.stored_codes))
        self.register_buffer("dedicated", torch.tensor(table.dedicated) if table.num_dedicated else None)
        self.register_buffer("mixing", torch.eye(embedding_dim) if mixing else None)
        self.tables = nn.ParameterList(
            torch.empty(size, width) for size, width in zip(self.table_sizes, self.widths, strict=True)
        )
        rows = nn.Parameter(torch.empty(table.num_dedicated, embedding_dim)) if table.num_dedicated else None
        self.register_parameter("dedicated_rows", rows)
        self._structure: CodeStructure | None = None
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        """The number of tokens, N."""
        return self.codes.shape[0]

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the tables from a normal distribution (BERT's 0.02); the dedicated rows are zero."""
        for table in self.tables:
            nn.init.normal_(table, std=std)
        if self.dedicated_rows is not None:
            nn.init.zeros_(self.dedicated_rows)

    def set_dedicated(self, table: CodeTable) -> None:
        """Make the dedicated tokens those of another table; tokens that had a row keep it, new rows are zero."""
        rows = self.tables[0].detach().new_zeros(table.num_dedicated, self.embedding_dim)
        if self.dedicated is not None and self.dedicated_rows is not None:
            _, new, old = np.intersect1d(table.dedicated, self.dedicated.cpu().numpy(), return_indices=True)
            rows[new] = self.dedicated_rows.detach()[old]
        trained = self.tables[0].requires_grad
        self.dedicated = torch.tensor(table.dedicated, device=self.codes.device) if len(rows) else None
        self.dedicated_rows = nn.Parameter(rows, trained) if len(rows) else None

    def code_table(self) -> CodeTable:
        """Return the codes, and which tokens are dedicated, as a `CodeTable`."""
        dedicated = None if self.dedicated is None else self.dedicated.cpu().numpy()
        codes = self.codes.cpu().numpy()
        if self.code_bits < 32:
            codes = unpack(codes, len(self.tables), self.code_bits)
        return CodeTable(codes, self.table_sizes, dedicated=dedicated, unique=not self.input_only)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (...) token ids: (..., d)."""
        codes = F.embedding(ids, self.codes)  # checks the range, where indexing would read -1 as the last token
        embedded = self._compose(codes)
        if self.dedicated is not None and self.dedicated_rows is not None:
            # Made in each call: it follows `dedicated` wherever that goes, and exports to ONNX (searchsorted does not).
            numbers = torch.arange(1, len(self.dedicated) + 1, device=ids.device)
            places = numbers.new_zeros(self.num_embeddings).index_copy(0, self.dedicated.long(), numbers)
            place = places[ids].unsqueeze(-1)  # from 1; 0 is for those without a row
            own = F.embedding(place.squeeze(-1).sub(1).clamp(min=0), self.dedicated_rows)
            embedded = torch.where(place > 0, embedded + own, embedded)
        if self.padding_idx is not None and embedded.requires_grad:
            embedded = torch.where((ids == self.padding_idx).unsqueeze(-1), embedded.detach(), embedded)
        return embedded

    def _compose(self, codes: Tensor) -> Tensor:
        """Return what the tables give to tokens with codes as they are stored, (..., K or bytes): (..., d)."""
        codes = self._unpacked(codes)
        if len(self.tables) < MANY_TABLES:
            parts = [F.embedding(codes[..., k], table) for k, table in enumerate(self.tables)]
        else:
            parts = list(self._look_up_together(codes))
        embedded = torch.cat(parts, dim=-1)
        if self.mixing is not None:
            # Not rounded by autocast, which leaves a lookup as it is; ZeRO 3 casts parameters, not buffers.
            with without_autocast(embedded.device):
                embedded = embedded @ self.mixing.t().to(embedded.dtype)
        return embedded

    def _unpacked(self, codes: Tensor) -> Tensor:
        """Turn stored codes, (..., K or bytes), to (..., K) int32."""
        codes = codes.int()  # nothing for int32
        if self.code_bits >= 8:
            return codes
        starts = torch.arange(0, len(self.tables) * self.code_bits, self.code_bits, device=codes.device)
        low = starts // 8
        both = codes[..., low] + 256 * codes[..., (low + 1).clamp(max=codes.shape[-1] - 1)]
        # Division and remainder export to ONNX, where shifts of signed numbers do not.
        return both // (2 ** (starts % 8)).int() % 2**self.code_bits

    def _look_up_together(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield what runs of tables of one shape give to codes (..., K): (..., width), a few operations for all."""
        first = 0
        for (size, _), tables in itertools.groupby(self.tables, key=lambda table: tuple(table.shape)):
            rows = torch.cat(list(tables))
            count = len(rows) // size
            places = codes[..., first : first + count] + torch.arange(0, len(rows), size, device=codes.device).int()
            yield F.embedding(places, rows).flatten(-2)
            first += count

    def dense_weight(self) -> Tensor:
        """Return the (N, d) matrix that this layer stands for."""
        rows = self._compose(self.codes)
        if self.dedicated is None or self.dedicated_rows is None:
            return rows
        return rows.index_add(0, self.dedicated, self.dedicated_rows)

    def dedicated_weight(self) -> Tensor:
        """Return those rows of the dense weight that belong to the dedicated tokens, (F, d), in float32."""
        assert self.dedicated is not None and self.dedicated_rows is not None, "there are no dedicated tokens"
        return self._compose(F.embedding(self.dedicated, self.codes)).float() + self.dedicated_rows.float()

    def to_tables(self, hidden: Tensor) -> Tensor:
        """Turn (..., d) decoder inputs to the columns of the tables: h · (A c) = (A^T h) · c, in float32 at least."""
        if self.mixing is None:
            return hidden
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # rounded again, log Z would not be the exact one
        return hidden.to(dtype) @ self.mixing.to(dtype)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute all N logits, (..., N), as sums of table scores; for a few rows, since N is wide.

        Raises:
            ValueError: the embedding is for the input alone.
        """
        if self.input_only:
            raise ValueError(NO_DECODER)
        parts = self.to_tables(hidden).to(hidden.dtype).split(self.widths, dim=-1)
        scores = [part @ table.t() for part, table in zip(parts, self.tables, strict=True)]
        total = scores[0].index_select(-1, self.codes[:, 0])  # ONNX gathers by int32 here, but not by [...]
        for k, score in enumerate(scores[1:], start=1):
            total = total + score.index_select(-1, self.codes[:, k])
        if self.dedicated is not None and self.dedicated_rows is not None:
            total = total.index_add(-1, self.dedicated.long(), hidden @ self.dedicated_rows.t())
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
        structure, found = self.structure, []
        bias = None if bias is None else bias.float()
        with exact_products(hidden.device):
            hidden = hidden.float()
            if structure.num_shared:
                of_shared = bias if bias is None or structure.shared is None else bias[structure.shared]
                logits, ids = self._best_shared(self.to_tables(hidden), min(k, structure.num_shared), of_shared)
                found.append((logits, ids if structure.shared is None else structure.shared[ids]))
            if self.dedicated is not None:
                block = DenseBlock(self.dedicated_weight(), None if bias is None else bias[self.dedicated])
                logits, places = block.topk(hidden, min(k, len(self.dedicated)))
                found.append((logits, self.dedicated.long()[places]))
        if len(found) == 1:
            return found[0]
        logits, ids = (torch.cat(both, dim=1) for both in zip(*found, strict=True))
        best, place = logits.topk(k, dim=1)
        return best, ids.gather(1, place)

    @torch.no_grad()
    def most_probable(self, hidden: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the largest of `logits(hidden, bias)`, exactly, at a cost that does not depend on them.

        Args:
            hidden: (B, d) decoder inputs.
            bias: (N,) or None.

        Returns:
            (B,) logits and (B,) token ids; of equal ones always the same.
        """
        logits, ids = self.predict_topk(hidden, 1, bias)
        return logits.squeeze(1), ids.squeeze(1)

    def _best_shared(self, hidden: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Find the k best of the shared tokens, by their places: (B, k) each. `hidden` is as the tables' columns."""
        if k > 1:
            return self.structure.search(self._scores(hidden), bias, k)
        fold = self.structure.best_unweighted if bias is None else self.structure.best_weighted
        leaf_bias = [] if bias is None else fold.leaf_bias(bias)
        found = [fold(self._scores(rows), bias, leaf_bias) for rows in hidden.split(fold.rows_per_block)]
        return torch.cat([best for best, _ in found]).unsqueeze(1), torch.cat([ids for _, ids in found]).unsqueeze(1)

    def _scores(self, hidden: Tensor) -> list[Tensor]:
        """Compute the table scores of (B, d) float32 rows, split as the tables: K matrices (B, M_k)."""
        parts = hidden.split(self.widths, dim=1)
        return [part @ table.float().t() for part, table in zip(parts, self.tables, strict=True)]

    @property
    def structure(self) -> CodeStructure:
        """The trie of the current codes, and what is computed over it.

        Raises:
            ValueError: the embedding is for the input alone.
        """
        if self.input_only:
            raise ValueError(NO_DECODER)
        known = self._structure
        if (
            known is None or known.codes is not self.codes or known.dedicated is not self.dedicated
        ):  # moved, or replaced
            known = self._structure = CodeStructure(self.codes, self.table_sizes, self.dedicated)
        return known

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
        sizes = f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, tables={self.table_sizes}"
        return sizes if self.dedicated is None else f"{sizes}, dedicated={len(self.dedicated)}"
