"""The ways to make an embedding small that the experiment compares: each returns a layer, its bytes, and a tokenizer.

All that know of token frequencies get the same counts. Bytes are what a file needs: numbers, codes, scales, indices.
A seed is that of k-means; methods without any chance get none.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from ksub_ds.codes.table import CodeTable
from ksub_ds.convert.input_only import fit_form, form_of_ratio
from ksub_ds.model.embedding import SubEmbedding


@dataclass(frozen=True)
class Small:
    """A small embedding.

    Attributes:
        layer: from token ids to vectors.
        bytes: of what it stores.
        tokenizer: another one than the model's, as the JSON of `tokenizers`; None: the model's.
    """

    layer: nn.Module
    bytes: int
    tokenizer: str | None = None


@dataclass(frozen=True)
class Original:
    """What is made small.

    Attributes:
        vectors: (N, d) float32.
        counts: (N,) how often each token occurs in some text.
        tokenizer: the JSON of the model's tokenizer.
    """

    vectors: np.ndarray
    counts: np.ndarray
    tokenizer: str

    @property
    def order(self) -> np.ndarray:
        """Tokens by falling frequency, special ones first."""
        first = [each["id"] for each in json.loads(self.tokenizer)["added_tokens"]]
        counts = self.counts.astype(np.float64)
        counts[first] = np.inf
        return np.argsort(-counts, kind="stable")


class FewerRows(nn.Module):
    """An embedding in which some tokens share one row, or several."""

    def __init__(self, rows: Tensor, row_of: Tensor):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(rows, freeze=False)
        self.register_buffer("row_of", row_of)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (...) ids: (..., d)."""
        return self.rows(self.row_of[ids])


def ours(original: Original, ratio: float, seed: int) -> Small:
    """`ksub compress --input-only --target-ratio --counts`."""
    count, width = original.vectors.shape
    form = form_of_ratio(ratio, count, width, itemsize=4)
    table, fit = fit_form(original.vectors, form, np.sqrt(original.counts + 1.0), seed)
    return _sub_embedding(table, fit.tables, fit.mixing)


def _sub_embedding(table: CodeTable, rows: list[np.ndarray], mixing: np.ndarray | None) -> Small:
    width = sum(part.shape[1] for part in rows)
    layer = SubEmbedding(table, width, mixing=mixing is not None)
    with torch.no_grad():
        for parameter, part in zip(layer.tables, rows, strict=True):
            parameter.copy_(torch.from_numpy(part))
        if mixing is not None and layer.mixing is not None:
            layer.mixing.copy_(torch.from_numpy(mixing))
    return Small(layer, table.stored_bytes(width, 4, 0 if mixing is None else mixing.size))


def product(original: Original, ratio: float, seed: int) -> Small:
    """FAISS's product quantiser: of the forms that fit, the one with the most bits for a token, packed as it packs."""
    count, width = original.vectors.shape
    quantiser = _product_form(count, width, original.vectors.nbytes / ratio)
    num_tables, bits = quantiser.M, quantiser.nbits
    quantiser.cp.seed = 1234 + seed  # its own default is 1234
    quantiser.train(original.vectors)
    packed = quantiser.compute_codes(original.vectors)
    single = np.unpackbits(packed, axis=1, count=num_tables * bits, bitorder="little")
    codes = single.reshape(count, num_tables, bits) @ (1 << np.arange(bits))
    tables = faiss.vector_to_array(quantiser.centroids).reshape(num_tables, 2**bits, -1)
    layer = _sub_embedding(CodeTable(codes, (2**bits,) * num_tables, unique=False), list(tables), None).layer
    return Small(layer, packed.nbytes + tables.nbytes)


def _product_form(count: int, width: int, budget: float) -> Any:
    """Return a ProductQuantizer of the form with the most bits for a token that fits into a number of bytes."""
    forms = [
        (number * bits, bits, number)
        for bits in range(4, 9)
        for number in range(1, width + 1)
        if width % number == 0 and -(-number * bits // 8) * count + 2**bits * width * 4 <= budget
    ]
    _, bits, number = max(forms)
    return faiss.ProductQuantizer(width, number, bits)


def rotated_product(original: Original, ratio: float, seed: int) -> Small:
    """FAISS's optimised product quantiser (OPQ): a rotation, learned with the codes, stands before the tables."""
    count, width = original.vectors.shape
    rotation = 4 * width * width
    quantiser = _product_form(count, width, original.vectors.nbytes / ratio - rotation)
    quantiser.cp.seed = 1234 + seed
    optimised = faiss.OPQMatrix(width, quantiser.M)
    optimised.pq = quantiser
    optimised.train(original.vectors)
    rotated = optimised.apply(original.vectors)
    packed = quantiser.compute_codes(rotated)
    restored = optimised.reverse_transform(quantiser.decode(packed))
    return _frozen(restored, packed.nbytes + 4 * quantiser.centroids.size() + rotation)


def residual(original: Original, ratio: float, seed: int) -> Small:
    """FAISS's residual quantiser: each table has rows of full width for what those before leave; the most bits fit."""
    count, width = original.vectors.shape
    budget = original.vectors.nbytes / ratio
    forms = []
    for bits in range(4, 9):
        number = int((budget - count) / (4 * 2**bits * width + count * bits / 8))
        forms.append((number * bits, bits, number))
    _, bits, number = max(forms)
    quantiser: Any = faiss.ResidualQuantizer(width, number, bits)
    quantiser.cp.seed = 1234 + seed
    quantiser.train(original.vectors)
    packed = quantiser.compute_codes(original.vectors)
    return _frozen(quantiser.decode(packed), packed.nbytes + 4 * number * 2**bits * width)


def _frozen(vectors: np.ndarray, stored: int) -> Small:
    """Return an embedding of restored vectors that `stored` bytes describe."""
    return Small(nn.Embedding.from_pretrained(torch.from_numpy(vectors.astype(np.float32)), freeze=True), stored)


def low_rank(original: Original, ratio: float) -> Small:
    """Two factors by singular values, as ALBERT has them: N x r and r x d."""
    count, width = original.vectors.shape
    rank = int(count * width / ratio / (count + width))
    left, values, right = np.linalg.svd(original.vectors, full_matrices=False)
    first = nn.Embedding.from_pretrained(torch.from_numpy(left[:, :rank] * values[:rank]), freeze=False)
    second = nn.Linear(rank, width, bias=False)
    with torch.no_grad():
        second.weight.copy_(torch.from_numpy(right[:rank].T))
    return Small(nn.Sequential(first, second), 4 * rank * (count + width))


def rounded(original: Original, ratio: float) -> Small:
    """Rows of int8 (ratio 4) or int4 (ratio 8) with a scale each; the scale of int4 is the best of 16."""
    bits = round(32 / ratio)
    vectors, most = original.vectors, 2 ** (bits - 1) - 1
    peak = np.abs(vectors).max(axis=1, keepdims=True)
    best, least = vectors, np.full(len(vectors), np.inf)
    for share in np.linspace(1, 0.6 if bits < 8 else 1, 16 if bits < 8 else 1):
        scale = np.maximum(share * peak / most, 1e-12)
        tried = np.clip(np.round(vectors / scale), -most - 1, most) * scale
        error = np.square(vectors - tried).sum(axis=1)
        best, least = np.where((error < least)[:, None], tried, best), np.minimum(error, least)
    return _frozen(best, vectors.size * bits // 8 + 4 * len(vectors))


def pruned(original: Original, ratio: float) -> Small:
    """The most frequent tokens keep their row; the others share their mean."""
    count, width = original.vectors.shape
    kept = int((count * width * 4 / ratio - 4 * width) // (4 * width + 4))
    order = original.order
    rows = np.concatenate([original.vectors[order[:kept]], original.vectors[order[kept:]].mean(axis=0, keepdims=True)])
    row_of = np.full(count, kept)
    row_of[order[:kept]] = np.arange(kept)
    return Small(FewerRows(torch.from_numpy(rows), torch.from_numpy(row_of)), 4 * rows.size + 4 * kept)


def trimmed(original: Original, ratio: float) -> Small:
    """The most frequent tokens stay in the vocabulary, single characters too; other words fall into pieces."""
    count, width = original.vectors.shape
    kept = int(count / ratio)
    described = json.loads(original.tokenizer)
    vocabulary = described["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    letters = [number for number, name in names.items() if len(name.removeprefix("##")) == 1 and name.isascii()]
    special = [each["id"] for each in described["added_tokens"]]
    chosen = list(dict.fromkeys([*special, *letters, *original.order.tolist()]))[:kept]
    described["model"]["vocab"] = {names[number]: number for number in chosen}
    row_of = np.zeros(count, dtype=np.int64)
    row_of[chosen] = np.arange(kept)
    layer = FewerRows(torch.from_numpy(original.vectors[chosen]), torch.from_numpy(row_of))
    return Small(layer, 4 * kept * width, json.dumps(described))


def unchanged(original: Original, ratio: float) -> Small:
    """The embedding as it is."""
    return Small(nn.Embedding.from_pretrained(torch.from_numpy(original.vectors.copy())), original.vectors.nbytes)


@dataclass(frozen=True)
class Method:
    """A way to make an embedding small.

    Attributes:
        make: from the original and a ratio of bytes; from a seed too if there is chance in it.
        ratios: at which it is measured.
        has_chance: whether two seeds differ before any training.
        needs_word_pieces: whether it knows that kind of tokenizer alone.
    """

    make: Callable[..., Small]
    ratios: tuple[float, ...]
    has_chance: bool = False
    needs_word_pieces: bool = False


METHODS = {
    "original": Method(unchanged, (1,)),
    "ours": Method(ours, (8, 12, 16, 20, 30, 60), has_chance=True),
    "product quantisation (faiss)": Method(product, (8, 16, 20, 29.9, 60), has_chance=True),
    "optimised product quantisation (faiss)": Method(rotated_product, (8, 16, 30), has_chance=True),
    "residual quantisation (faiss)": Method(residual, (30, 60), has_chance=True),
    "int8, int4 rows": Method(rounded, (4, 8)),
    "low rank (SVD)": Method(low_rank, (8, 16, 30)),
    "vocabulary trimmed": Method(trimmed, (8, 16, 30), needs_word_pieces=True),
    "pruned to frequent tokens": Method(pruned, (8, 16, 30)),
}


def install(encoder: Any, small: Small) -> Any:
    """Return a copy of a SentenceTransformer with a small embedding, and its tokenizer if it has one of its own."""
    from tokenizers import Tokenizer

    encoder = copy.deepcopy(encoder)
    encoder[0].auto_model.set_input_embeddings(small.layer)
    if small.tokenizer is not None:
        encoder.tokenizer.backend_tokenizer.model = Tokenizer.from_str(small.tokenizer).model
    return encoder
