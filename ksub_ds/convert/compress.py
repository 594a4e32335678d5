"""Compress a trained model: its embedding becomes tables fitted to it, at both ends; all other weights stay.

    ksub compress plain_model --num-tables 3 --table-size 128 --out small_model
    ksub compress sentence_encoder --input-only --target-ratio 20 --out small_encoder

    from ksub_ds import clustered_codes, compress
    small = compress("plain_model", clustered_codes(vectors, num_tables=3, table_size=128, axes=128))

That result is a start for continued pretraining or distillation: 384 rows cannot hold what 30,000 did, and the layers
above have to learn to read what is left. small_model holds the weights, the codes (also as codes.safetensors), the
tokenizer and compression.json. Next: `ksub pretrain --warm-start small_model`, with or without
`--distill-from plain_model`. A model that predicts no tokens takes any codes (input_only.py), and keeps nearly all of
what it could do. The command is in compress_command.py.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.fitting import Fit, Mixing, fit_all
from ksub_ds.convert.sentence_encoder import encoder_folder

TOKENS_AT_ONCE = 16_384  # compared at a time: N x d numbers may be a gigabyte

if TYPE_CHECKING:  # seconds of imports that --help does without
    from transformers import PreTrainedModel

    from ksub_ds.model.base import SubEmbeddingModel
    from ksub_ds.model.embedding import SubEmbedding


@dataclass(frozen=True)
class CompressionReport:
    """What compression did, in numbers.

    Attributes:
        num_tokens: N.
        table_sizes: M_1 .. M_K.
        mixing: the matrix beside the tables: "linear", "orthogonal" or "none".
        error: squared distance of old and new embeddings, relative to that of one mean vector for all, each token with
            its weight; where the decoder has a matrix of its own, this and the next are the mean of both.
        cosine: mean cosine between old and new embeddings.
        embedding_parameters: before and after; the tables are what is trained.
        mixing_numbers: fixed numbers of the d x d matrix that stays with the tables; 0 if there is none.
        total_parameters: of the whole model, before and after.
        loss: of the callback, before and after.
        num_dedicated: F, how many tokens have a row of their own beside the tables.
        embedding_bytes: before and after, as a model file stores them: codes and the matrix are counted too.
        input_only: whether codes may repeat, so that no decoder can use the tables.
        weighted: whether tokens had weights, as by their frequency: `error` is then no plain share of the variance.
        matrix_bytes: what a row for every token takes; more than `embedding_bytes` before, if that was compressed.
        dropped_tokens: how many last ids of the model have no code.
    """

    num_tokens: int
    table_sizes: tuple[int, ...]
    mixing: str
    error: float
    cosine: float
    embedding_parameters: tuple[int, int]
    mixing_numbers: int
    total_parameters: tuple[int, int]
    loss: tuple[float, float] | None = None
    num_dedicated: int = 0
    embedding_bytes: tuple[int, int] = (0, 0)
    input_only: bool = False
    weighted: bool = False
    matrix_bytes: int = 0
    dropped_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)

    @property
    def ratio(self) -> float:
        """How many times the old embedding's bytes are those of the new one."""
        return self.embedding_bytes[0] / max(1, self.embedding_bytes[1])

    @property
    def compressed_before(self) -> bool:
        """Whether the old embedding took less than a row for every token."""
        return self.embedding_bytes[0] < self.matrix_bytes

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        (old, new), (all_old, all_new) = self.embedding_parameters, self.total_parameters
        own = f", {self.num_dedicated:,} dedicated rows among them" if self.num_dedicated else ""
        variance = "weighted variance" if self.weighted else "variance"
        fixed = f" and {self.mixing_numbers:,} fixed numbers (the {self.mixing} matrix)" if self.mixing_numbers else ""
        bytes_old, bytes_new = self.embedding_bytes
        again = f"; 1/{self.matrix_bytes / bytes_new:.1f} of a row for every token" if self.compressed_before else ""
        lines = [
            f"embedding parameters   {old:,} -> {new:,}{own}{fixed}",
            f"embedding bytes        {bytes_old:,} -> {bytes_new:,}, codes included: 1/{self.ratio:.1f}{again}",
            f"all parameters         {all_old:,} -> {all_new:,}",
            f"embedding error        {self.error:.4f} of the {variance} is lost; mean cosine {self.cosine:.4f}",
        ]
        if bytes_new > bytes_old:
            lines.append("larger than before     tables and codes take more bytes than what they replace")
        if self.loss is not None:
            lines.append(f"masked-token loss      {self.loss[0]:.4f} -> {self.loss[1]:.4f} nats")
        return lines


def compress(
    model_or_name: "PreTrainedModel | str | Path",
    table: CodeTable,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> "SubEmbeddingModel":
    """Return a trained model over sub-embeddings whose tables are fitted to its embedding by least squares.

    Args:
        model_or_name: a model, a folder in HuggingFace's form, or a name in the local cache or on the Hub; the
            families of `replace_embeddings`, or one of ours (a plain one, K = 1, too). Folders are read from
            safetensors only.
        table: codes of as many tokens as the model has, or fewer: later ids are then dropped. Dedicated tokens keep
            their embedding as it is, the tables are fitted to the others.
        mixing: the d x d matrix beside the tables: "linear", "orthogonal" or "none" (fitting.py).
        weights: (N,) how much each token counts, for example its frequency. [1]

    Raises:
        ValueError: a model that `replace_embeddings` refuses, codes or weights that `fit_tables` refuses, an
            encoder's decoder that is not tied, or (as UserError) a folder or name that cannot be read.
    """
    small, report = compress_with_report(model_or_name, table, mixing, weights)
    if report.dropped_tokens:
        get_logger().warning(f"{report.dropped_tokens:,} ids of the model have no code, and are dropped")
    return small


def compress_with_report(
    model_or_name: "PreTrainedModel | str | Path",
    table: CodeTable,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
    loss: "Callable[[PreTrainedModel], float] | None" = None,
    fits: list[Fit] | None = None,
) -> "tuple[SubEmbeddingModel, CompressionReport]":
    """Compress a model and measure what that did.

    Args:
        model_or_name: as for `compress`, like the next three.
        table: the codes.
        mixing: the matrix beside the tables.
        weights: of the tokens.
        loss: measured on the model before and after, for example its masked-token loss on some text.
        fits: of the tables, where they are fitted already: one a matrix. [fitted here]

    Returns:
        The compressed model, and the report.

    Raises:
        ValueError: as `compress`.
    """
    from transformers import PreTrainedModel

    from ksub_ds.model.loading import open_model
    from ksub_ds.model.replacement import decoder_matrix, embedding_matrix, replace_embeddings

    model = model_or_name if isinstance(model_or_name, PreTrainedModel) else open_model(encoder_folder(model_or_name))
    own = decoder_matrix(model)
    old = [each.float().cpu().numpy() for each in (embedding_matrix(model), own) if each is not None]
    old = [vectors[: table.num_tokens] for vectors in old]
    fits = fits or fit_all(old, table, mixing, weights)
    small = replace_embeddings(model, table, mixing=fits[0].mixing is not None)
    layers = (
        [small.get_input_embeddings()] if own is None else [small.get_input_embeddings(), small.decoder_embedding()]
    )
    for layer, each, vectors in zip(layers, fits, old, strict=True):
        _fill(layer, table, each, vectors)
    counted = np.ones(table.num_tokens) if weights is None else weights
    measured = [_error_and_cosine(*pair, counted) for pair in zip(layers, old, strict=True)]
    bytes_before = _bytes(model.get_input_embeddings()) + (0 if own is None else own.nbytes)
    report = CompressionReport(
        table.num_tokens,
        table.table_sizes,
        "none" if fits[0].mixing is None else mixing,
        sum(error for error, _ in measured) / len(fits),
        sum(cosine for _, cosine in measured) / len(fits),
        (
            sum(each.numel() for each in model.get_input_embeddings().parameters())
            + (0 if own is None else own.numel()),
            table.num_parameters(old[0].shape[1]) * len(fits),
        ),
        sum(0 if each.mixing is None else each.mixing.size for each in fits),
        (model.num_parameters(), small.num_parameters()),
        None if loss is None else (loss(model), loss(small)),
        table.num_dedicated,
        (bytes_before, sum(map(_bytes, layers))),
        not table.unique,
        weights is not None,
        sum(each.size for each in old) * model.dtype.itemsize,
        model.config.vocab_size - table.num_tokens,
    )
    return small, report


def _fill(layer: "SubEmbedding", table: CodeTable, fit: Fit, vectors: np.ndarray) -> None:
    """Put fitted tables into a sub-embedding; its dedicated rows take what these leave of the (N, d) vectors."""
    import torch

    with torch.no_grad():
        for k, (ours, fitted) in enumerate(zip(layer.tables, fit.tables, strict=True)):
            used = torch.from_numpy(np.unique(table.codes[:, k]))
            rows = torch.from_numpy(fitted)[used].to(ours.device)
            ours += rows.mean(dim=0)  # rows for tokens that join later: near the others
            ours[used] = rows.to(ours.dtype)
        if layer.mixing is not None:
            layer.mixing.copy_(torch.as_tensor(fit.mixing))
        if layer.dedicated_rows is not None:  # zero so far
            rest = vectors[table.dedicated] - layer.dedicated_weight().cpu().numpy()
            layer.dedicated_rows.copy_(torch.from_numpy(rest))


def _bytes(layer: Any) -> int:
    return sum(value.nbytes for value in (*layer.parameters(), *layer.buffers()))


def _error_and_cosine(layer: "SubEmbedding", vectors: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Compare a sub-embedding with the (N, d) vectors it stands for, some tokens at a time.

    Returns:
        sum of w_n |x_n - e_n|^2 over sum of w_n |x_n - mean|^2, and the mean cosine, each token alike.
    """
    import torch

    from ksub_ds.model.embedding import SubEmbedding

    mean = ((weights / weights.sum()) @ vectors).astype(np.float32)
    lost = spread = cosines = 0.0
    for first in range(0, len(vectors), TOKENS_AT_ONCE):
        old, counted = vectors[first : first + TOKENS_AT_ONCE], weights[first : first + TOKENS_AT_ONCE]
        ids = torch.arange(first, first + len(old), device=layer.codes.device)
        with torch.no_grad():
            new = SubEmbedding.forward(layer, ids).float().cpu().numpy()  # Gemma 3's own forward scales
        lost += float(counted @ np.square(old - new).sum(axis=1))
        spread += float(counted @ np.square(old - mean).sum(axis=1))
        norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
        cosines += float(((old * new).sum(axis=1) / np.maximum(norms, 1e-30)).sum())
    return lost / max(spread, 1e-30), cosines / len(vectors)
