"""Compress a trained model: its embedding becomes tables fitted to it, at both ends; all other weights stay.

    ksub compress plain_model --num-tables 3 --table-size 128 --out small_model

    from ksub_ds import clustered_codes, compress
    small = compress("plain_model", clustered_codes(vectors, num_tables=3, table_size=128))

The result is a start for continued pretraining or distillation: 384 rows cannot hold what 30,000 did, and the layers
above have to learn to read what is left. small_model holds the weights, the codes (also as codes.safetensors), the
tokenizer and compression.json. Next: `ksub pretrain --warm-start small_model`, with or without
`--distill-from plain_model`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.fitting import Fit, Mixing, fit_tables
from ksub_ds.convert.sentence_encoder import copy_sentence_files, encoder_folder, sentence_folder
from ksub_ds.model.sequence_length import limit_tokenizer
from ksub_ds.vectors.dedicated import DedicatedChoice, dedicate

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
        error: squared distance of old and new embeddings, relative to that of one mean vector for all; where the
            decoder has a matrix of its own, this and the next are the mean of both.
        cosine: mean cosine between old and new embeddings.
        embedding_parameters: before and after; the tables are what is trained.
        mixing_numbers: fixed numbers of the d x d matrix that stays with the tables; 0 if there is none.
        total_parameters: of the whole model, before and after.
        loss: of the callback, before and after.
        num_dedicated: F, how many tokens have a row of their own beside the tables.
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

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        (old, new), (all_old, all_new) = self.embedding_parameters, self.total_parameters
        own = f", {self.num_dedicated:,} dedicated rows among them" if self.num_dedicated else ""
        fixed = f" and {self.mixing_numbers:,} fixed numbers (the {self.mixing} matrix)" if self.mixing_numbers else ""
        lines = [
            f"embedding parameters   {old:,} -> {new:,}{own}{fixed}",
            f"all parameters         {all_old:,} -> {all_new:,}",
            f"embedding error        {self.error:.4f} of the variance is lost; mean cosine {self.cosine:.4f}",
        ]
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
        table: codes of its tokens; dedicated tokens keep their embedding as it is, the tables are fitted to the others.
        mixing: the d x d matrix beside the tables: "linear", "orthogonal" or "none" (fitting.py).
        weights: (N,) how much each token counts, for example its frequency. [1]

    Raises:
        ValueError: a model that `replace_embeddings` refuses, codes or weights that `fit_tables` refuses, an
            encoder's decoder that is not tied, or (as UserError) a folder or name that cannot be read.
    """
    return compress_with_report(model_or_name, table, mixing, weights)[0]


def compress_with_report(
    model_or_name: "PreTrainedModel | str | Path",
    table: CodeTable,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
    loss: "Callable[[PreTrainedModel], float] | None" = None,
) -> "tuple[SubEmbeddingModel, CompressionReport]":
    """Compress a model and measure what that did.

    Args:
        model_or_name: as for `compress`, like the next three.
        table: the codes.
        mixing: the matrix beside the tables.
        weights: of the tokens.
        loss: measured on the model before and after, for example its masked-token loss on some text.

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
    fits = [fit_tables(vectors, table, mixing, _weights_of_shared(table, weights)) for vectors in old]
    small = replace_embeddings(model, table, mixing=fits[0].mixing is not None)
    layers = (
        [small.get_input_embeddings()] if own is None else [small.get_input_embeddings(), small.decoder_embedding()]
    )
    for layer, fit, vectors in zip(layers, fits, old, strict=True):
        _fill(layer, table, fit, vectors)
    new = [layer.dense_weight().detach().float().cpu().numpy() for layer in layers]
    counted = np.ones(table.num_tokens) if weights is None else weights
    report = CompressionReport(
        table.num_tokens,
        table.table_sizes,
        "none" if fits[0].mixing is None else mixing,
        sum(_relative_error(*pair, counted) for pair in zip(old, new, strict=True)) / len(fits),
        sum(map(_mean_cosine, old, new)) / len(fits),
        (
            sum(each.numel() for each in model.get_input_embeddings().parameters())
            + (0 if own is None else own.numel()),
            table.num_parameters(old[0].shape[1]) * len(fits),
        ),
        sum(0 if fit.mixing is None else fit.mixing.size for fit in fits),
        (model.num_parameters(), small.num_parameters()),
        None if loss is None else (loss(model), loss(small)),
        table.num_dedicated,
    )
    return small, report


def _weights_of_shared(table: CodeTable, weights: np.ndarray | None) -> np.ndarray | None:
    """Return the weights with 0 for the dedicated tokens: their own rows take whatever the tables leave."""
    if not table.num_dedicated:
        return weights
    shared = np.ones(table.num_tokens) if weights is None else np.array(weights, dtype=np.float64)
    shared[table.dedicated] = 0
    return shared if shared.any() else weights  # tokens that are all dedicated still want a common part


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


def _relative_error(vectors: np.ndarray, dense: np.ndarray, weights: np.ndarray) -> float:
    """Return sum of w_n |x_n - e_n|^2 over sum of w_n |x_n - mean|^2."""
    mean = ((weights / weights.sum()) @ vectors).astype(np.float32)
    lost, spread = (weights @ np.square(vectors - each).sum(axis=1) for each in (dense, mean))
    return float(lost / max(spread, 1e-30))


def _mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / np.maximum(norms, 1e-30)).mean())


# ---------------------------------------------------------------- ksub compress


@dataclass(frozen=True)
class CompressModel:
    """Replace a trained model's embedding by K small tables, fitted to it by least squares."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder (or Hub name): BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, ModernBERT, an export of
    `ksub pretrain --plain`, or a causal model: Llama, Mistral, Qwen3, Gemma 3 (text), GPT-2."""
    out: Path
    """Folder to write."""
    num_tables: int = 3
    """K, how many tables replace the embedding."""
    table_size: int = 128
    """M, the rows of every table."""
    codes: Path | None = None
    """Code file to use. [codes by clustering the model's own embedding, K tables of M rows]"""
    mixing: Mixing = "linear"
    """The fixed d x d matrix beside the tables: any matrix, a rotation, or none."""
    dedicated_rows: int | None = None
    """F: the most frequent tokens of --data keep the embedding that they have, in rows of their own."""
    dedicated_tokens: Path | None = None
    """In place of --dedicated-rows: a file of token ids, one per line."""
    data: Path | None = None
    """Shards folder made with the model's tokenizer: the masked-token loss on its held-out part, before and after."""
    sequences: int = 64
    """Held-out sequences per language for that loss."""
    seed: int = 0
    """Seed of the clustering."""


def compress_model(settings: CompressModel) -> Path:
    """Compress a model and write its folder.

    Args:
        settings: the options of `ksub compress`.

    Returns:
        The folder.

    Raises:
        UserError: the model cannot be read or compressed, codes or data do not fit it, or a folder is in the way.
    """
    from ksub_ds.model.loading import open_model
    from ksub_ds.model.replacement import embedding_matrix

    out, log = settings.out, get_logger()
    if out.exists() and not (out / "compression.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not a compressed model and not empty; choose another folder")
    if settings.sequences < 1:
        raise UserError(f"--sequences {settings.sequences}: must be at least 1")
    choice = DedicatedChoice(settings.dedicated_rows, settings.data, settings.dedicated_tokens)
    encoder, sentences = encoder_folder(settings.model), sentence_folder(settings.model)
    model = open_model(encoder)
    tokenizer = _tokenizer(str(encoder))
    only_counted = settings.dedicated_rows is not None and not _predicts_masked_tokens(model)
    loss = None
    if settings.data is not None and not only_counted:
        loss = _masked_loss(settings, encoder, model, tokenizer)
    try:
        vectors = embedding_matrix(model)
        if tokenizer is not None and len(tokenizer) < len(vectors):
            log.info(f"{settings.model}: {len(vectors) - len(tokenizer):,} rows beyond the tokenizer's left out")
            vectors = vectors[: len(tokenizer)]
        table = dedicate(_codes(settings, vectors.float().cpu().numpy()), choice)
        small, report = compress_with_report(model, table, settings.mixing, loss=loss)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{settings.model}: {error}") from error
    with atomic_folder(out) as temporary:
        small.save_pretrained(temporary)
        table.save(temporary / "codes.safetensors")
        _save_tokenizer(Path(encoder), tokenizer, temporary)
        limit_tokenizer(temporary, small.config)
        if sentences is not None:
            copy_sentence_files(sentences, temporary)
        source = {"model": settings.model, "codes_sha256": table.sha256}
        write_json(temporary / "compression.json", source | report.to_json())
    for line in report.lines():
        log.info(line)
    log.info(f"{out}: written" + ("" if small.can_generate() else f". Next: ksub pretrain --warm-start {out}"))
    return out


def _tokenizer(name: str) -> Any:
    """Open the tokenizer that lies with the model; without one, log a warning and return None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # Where there are no files, transformers makes an empty tokenizer rather than fail.
        if len(tokenizer) >= 2 * len(tokenizer.all_special_ids):
            return tokenizer
        reason = "no file of a vocabulary"
    except Exception as error:  # transformers raises many kinds here
        reason = str(error).strip().split("\n")[0][:160]
    get_logger().warning(f"{name}: no tokenizer that transformers opens ({reason}); the new folder has none")
    return None


def _save_tokenizer(source: Path, tokenizer: Any, target: Path) -> None:
    """Save a tokenizer: as this project does if it knows the kind, which keeps SentencePiece's model, or by itself."""
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    if tokenizer is None:
        return
    if source.is_dir():
        try:
            load_tokenizer(source).save(target)
            return
        except UserError:
            pass  # a tokenizer without a mask token, say
    tokenizer.save_pretrained(target)


def _codes(settings: CompressModel, vectors: Any) -> CodeTable:
    if settings.codes is None:
        from ksub_ds.codes.clustering import clustered_codes

        table = clustered_codes(vectors, settings.num_tables, settings.table_size, seed=settings.seed)
        table.metadata["vectors"] = f"input embeddings of model {Path(settings.model).name}"
        return table
    table = CodeTable.load(settings.codes)
    if table.num_tokens != len(vectors):
        raise UserError(
            f"--codes {settings.codes}: codes of {table.num_tokens:,} tokens, the model has {len(vectors):,}"
        )
    return table


def _predicts_masked_tokens(model: Any) -> bool:
    return type(model).__name__.endswith("ForMaskedLM")


def _masked_loss(settings: CompressModel, encoder: Path | str, model: Any, tokenizer: Any) -> Callable[[Any], float]:
    """Return a function from a model to its mean loss over the masked tokens of the held-out part.

    Raises:
        UserError: the model predicts no masked tokens, or the shards do not fit it.
    """
    from ksub_ds.corpus.batches import HeldOutBatches
    from ksub_ds.corpus.shards.dataset import ShardDataset
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.pretrain.prefetch import to_tensors

    assert settings.data is not None
    if not _predicts_masked_tokens(model):
        raise UserError(f"--data: {settings.model} is a {type(model).__name__}, which predicts no masked tokens")
    dataset = ShardDataset.open(settings.data)
    if Path(encoder).is_dir():
        dataset.check_tokenizer(load_tokenizer(encoder).fingerprint, settings.model)
    elif tokenizer is not None and len(tokenizer) != dataset.manifest["tokenizer"]["vocab_size"]:
        raise UserError(f"--data {settings.data}: made with another tokenizer than that of {settings.model}")
    batches = HeldOutBatches(dataset, settings.sequences, mlm_probability=0.15, batch_size=8)
    if not len(batches):
        raise UserError(f"--data {settings.data}: has no held-out part; make it with --validation-fraction 0.01")

    def measure(model: Any) -> float:
        import torch

        total = count = 0.0
        with torch.no_grad():
            for _, batch in batches:
                tensors = to_tensors(batch, "cpu")
                labelled = float((tensors["labels"] != -100).sum())
                if labelled:
                    total += float(model(**tensors).loss) * labelled
                    count += labelled
        return total / count

    return measure
