"""`ksub compress`: a model's folder in, a folder of the same model over small tables out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ksub_ds.codes.blocks import LARGEST_NUMBER
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, check_output_folder, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.compress import CompressionReport, compress_with_report
from ksub_ds.convert.fitting import Fit, Mixing
from ksub_ds.convert.input_only import MOST_ROWS, InputForm, fit_form, fit_to_error, form_of_ratio
from ksub_ds.convert.sentence_encoder import copy_sentence_files, encoder_folder, sentence_folder
from ksub_ds.convert.source import MODEL_FILES, head_of
from ksub_ds.convert.target_rows import dedicate_to_error, dedicate_to_ratio
from ksub_ds.convert.token_counts import check_shards, count_tokens
from ksub_ds.model.sequence_length import limit_tokenizer
from ksub_ds.vectors.dedicated import DedicatedChoice, dedicate

TARGET_RATIO = 16.0  # of --input-only without another wish
DISTILLATION_MINUTES = 30.0
# Of clustering: codes found in 128 principal axes lose less than those found in all 384, and 15 iterations of k-means
# win three thousandths of the variance more, for up to twice as many passes (experiments/compress/README.md).
AXES, ITERATIONS = 128, 6


@dataclass(frozen=True)
class CompressModel:
    """Replace a trained model's embedding by K small tables: fitted by least squares, or by product quantisation."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder (or Hub name): BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, ModernBERT, an export of
    `ksub pretrain --plain`, or a causal model: Llama, Mistral, Qwen3, Gemma 3 (text), GPT-2."""
    out: Path
    """Folder to write."""
    input_only: bool = False
    """For models that predict no tokens (sentence encoders, classifiers): many tables, and codes that need not be
    unique, by product quantisation; far less is lost. No decoder can use such tables."""
    target_ratio: float | None = None
    """The embedding takes at most 1/RATIO of the bytes of a row for every token, codes counted: by the number of tables
    with --input-only [16], else by how many tokens keep their row, those that the tables serve worst."""
    target_error: float | None = None
    """In place of a ratio: about as few tables, or rows, as lose at most this share (0.1) of the variance, where tokens
    count as by --counts."""
    counts: Path | None = None
    """Shards folder, or text in any form that shard_text.py reads: a token counts by the root of its frequency there.
    [the text of --distill; else all tokens alike]"""
    distill: Path | None = None
    """For sentence encoders: text (each line of a .txt is one); the compressed model learns to give the vectors that
    the original gives for its lines. The same command again goes on where it was (snapshots in OUT.distillation)."""
    minutes: float | None = None
    """Of --distill, beside at most 21 evaluations on 512 texts; it ends earlier when held-out text gains nothing any
    more. [30]"""
    num_tables: int | None = None
    """K, how many tables replace the embedding. [3; with --input-only as many as the target allows]"""
    table_size: int | None = None
    """M, the rows of every table. [128; with --input-only up to 256]"""
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
    """Seed of the clustering, of --input-only's quantisation, and of --distill."""


def compress_model(settings: CompressModel) -> Path:
    """Compress a model and write its folder.

    Args:
        settings: the options of `ksub compress`.

    Returns:
        The folder.

    Raises:
        UserError: the model cannot be read or compressed, codes or data do not fit it, or a folder is in the way.
    """
    from ksub_ds.model.loading import open_model, quiet_transformers

    out, log = settings.out, get_logger()
    replaces = check_output_folder(out, "a compressed model", _is_compressed, MODEL_FILES, settings.model)
    state = out.with_name(f"{out.name}.distillation")
    _check(settings)
    _check_distillation(settings, state)
    choice = DedicatedChoice(settings.dedicated_rows, settings.data, settings.dedicated_tokens)
    encoder, sentences = encoder_folder(settings.model), sentence_folder(settings.model)
    model = open_model(encoder)
    if settings.distill is not None and head_of(type(model).__name__):
        raise UserError(
            f"--distill: {settings.model} is a {type(model).__name__}, not a sentence encoder; a masked language model "
            "learns from its original by ksub pretrain --warm-start --distill-from"
        )
    lesson = _lesson(settings)
    tokenizer = _tokenizer(str(encoder))
    try:
        small, table, report = _compressed(settings, choice, encoder, model, tokenizer)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{settings.model}: {error}") from error
    with atomic_folder(out) as temporary:
        with quiet_transformers():
            small.save_pretrained(temporary)
        table.save(temporary / "codes.safetensors")
        _save_tokenizer(Path(encoder), tokenizer, temporary)
        limit_tokenizer(temporary, small.config)
        if sentences is not None:
            copy_sentence_files(sentences, temporary)
        source = {"model": settings.model, "codes_sha256": table.sha256}
        source |= _distilled(settings, lesson, temporary, state)
        write_json(temporary / "compression.json", source | report.to_json())
    if settings.distill is not None:
        shutil.rmtree(state, ignore_errors=True)
    for line in [*report.lines(), *_distillation_lines(source)]:
        log.info(line)
    written = "written, in place of the compressed model that was there" if replaces else "written"
    log.info(f"{out}: {written}{_advice(settings, small, table)}")
    return out


def _compressed(
    settings: CompressModel, choice: DedicatedChoice, encoder: Path | str, model: Any, tokenizer: Any
) -> tuple[Any, CodeTable, CompressionReport]:
    """Return the compressed model, its codes, and what was lost.

    Args:
        settings: the options.
        choice: of the tokens that keep their rows.
        encoder: the model's folder or name.
        model: the model.
        tokenizer: its tokenizer, or None.

    Raises:
        UserError: codes, data or a target do not fit the model, or its embedding is damaged.
        ValueError: the model's embedding cannot be replaced.
    """
    from ksub_ds.model.replacement import embedding_matrix

    only_counted = settings.dedicated_rows is not None and not _predicts_masked_tokens(model)
    loss = None
    if settings.data is not None and not only_counted:
        loss = _masked_loss(settings, encoder, model, tokenizer)
    vectors = embedding_matrix(model)
    if tokenizer is not None and len(tokenizer) < len(vectors):
        spare = len(vectors) - len(tokenizer)
        get_logger().info(f"{settings.model}: {spare:,} rows beyond the tokenizer's left out")
        vectors = vectors[: len(tokenizer)]
    if not max(float(vectors.max()), -float(vectors.min())) <= LARGEST_NUMBER:
        raise UserError(
            f"{settings.model}: its embedding has a number that is NaN or beyond {LARGEST_NUMBER:g}; fetch it anew"
        )
    damaged = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if damaged is not None:
        raise UserError(f"{settings.model}: {damaged} has a number that is NaN or infinite; fetch it anew")
    if settings.num_tables is not None and settings.num_tables > vectors.shape[1]:
        raise UserError(
            f"--num-tables {settings.num_tables}: must be at most {vectors.shape[1]}, the embedding's width"
        )
    weights = None
    counts = settings.counts or settings.distill
    if counts is not None:
        flag = "--counts" if settings.counts else "--distill"
        weights = np.sqrt(count_tokens(counts, tokenizer, len(vectors), flag, encoder) + 1.0)
    if settings.input_only:
        table, fit = _input_tables(settings, model, vectors, weights)
        small, report = compress_with_report(model, table, "orthogonal", weights, fits=[fit])
    else:
        matrix = vectors.float().cpu().numpy()
        table = dedicate(_codes(settings, matrix), choice)
        table, fits = _to_target(settings, table, model, matrix, weights, vectors.element_size())
        small, report = compress_with_report(model, table, settings.mixing, weights, loss, fits)
    return small, table, report


def _advice(settings: CompressModel, small: Any, table: CodeTable) -> str:
    """Return what to do next, or could be done better, in words."""
    if _predicts_masked_tokens(small) and table.unique:
        return f". Next: ksub pretrain --warm-start {settings.out}"
    if not table.unique or small.can_generate():
        return ""
    return f". A {type(small).__name__} predicts no tokens: --input-only loses far less at the same bytes"


def _check(settings: CompressModel) -> None:
    """Check that the options belong together, before any long work.

    Raises:
        UserError: they do not.
    """
    if settings.sequences < 1:
        raise UserError(f"--sequences {settings.sequences}: must be at least 1")
    if not 0 <= settings.seed < 2**31:  # FAISS takes an int
        raise UserError(f"--seed {settings.seed}: must lie in 0..{2**31 - 1}")
    for name, least in (("target_ratio", 1), ("target_error", 0), ("num_tables", 0), ("table_size", 1)):
        value = getattr(settings, name)
        if value is not None and not (value > least and value < float("inf")):
            finite = ", and finite" if isinstance(value, float) else ""
            raise UserError(f"--{name.replace('_', '-')} {value}: must be greater than {least}{finite}")
    if settings.target_error is not None and settings.target_error >= 1:
        raise UserError(
            f"--target-error {settings.target_error:g}: is a share of the variance, between 0 and 1 (10 % is 0.1)"
        )
    if settings.input_only:
        wishes = [
            name for name in ("target_ratio", "target_error", "num_tables") if getattr(settings, name) is not None
        ]
        options = [f"--{name.replace('_', '-')}" for name in wishes]
        others = {
            "--codes": settings.codes is not None,
            "--dedicated-rows": settings.dedicated_rows is not None,
            "--data": settings.data is not None,
            "--dedicated-tokens": settings.dedicated_tokens is not None,
            "--mixing": settings.mixing != "linear",
        }
        given = [name for name, is_given in others.items() if is_given]
        if given:
            raise UserError(f"--input-only: makes its own codes and tables, for no decoder; leave {given[0]} out")
        if len(options) > 1:
            raise UserError(f"{' and '.join(options)}: each says how many tables there are; give one of them")
        return
    wishes = [
        name for name in ("target_ratio", "target_error", "dedicated_rows") if getattr(settings, name) is not None
    ]
    if len(wishes) > 1:
        options = [f"--{name.replace('_', '-')}" for name in wishes]
        raise UserError(f"{' and '.join(options)}: each says how many tokens keep their rows; give one of them")


def _is_compressed(folder: Path) -> bool:
    """Return whether `ksub compress` made a folder."""
    return (folder / "compression.json").is_file()


def _check_distillation(settings: CompressModel, state: Path) -> None:
    """Check the options of --distill.

    Args:
        settings: the options.
        state: where its snapshots lie.

    Raises:
        UserError: minutes that are none or for nothing, no text, sentence-transformers is not installed, or something
            is where the snapshots would be.
    """
    if settings.distill is None:
        if settings.minutes is not None:
            raise UserError(f"--minutes {settings.minutes:g}: is for --distill; give it text, or leave --minutes out")
        return
    if settings.minutes is not None and not 0 < settings.minutes < float("inf"):
        raise UserError(f"--minutes {settings.minutes}: must be greater than 0, and finite")
    if not settings.distill.exists():
        raise UserError(f"--distill {settings.distill}: no such file or folder")
    if find_spec("sentence_transformers") is None:
        raise UserError("--distill: needs sentence-transformers (pip install -e '.[interop]')")
    from ksub_ds.convert.sentence_distillation import check_snapshots

    check_snapshots(state)


def _lesson(settings: CompressModel) -> tuple[Any, list[str]] | None:
    """Open the original and read the texts that --distill teaches with, before the long work; None without it."""
    if settings.distill is None:
        return None
    from ksub_ds.convert.sentence_distillation import open_teacher, read_texts

    return open_teacher(settings.model), read_texts(settings.distill)


def _distilled(
    settings: CompressModel, lesson: tuple[Any, list[str]] | None, folder: Path, state: Path
) -> dict[str, Any]:
    """Distil the model in a folder if that is asked for; return what compression.json says of it."""
    if lesson is None:
        return {}
    from ksub_ds.convert.sentence_distillation import distil_folder

    minutes = DISTILLATION_MINUTES if settings.minutes is None else settings.minutes
    teacher, texts = lesson
    return {"distillation": distil_folder(folder, teacher, settings.model, texts, minutes, settings.seed, state)}


def _distillation_lines(source: dict[str, Any]) -> list[str]:
    """Return a line on what compression.json says of a distillation, if there was one."""
    if "distillation" not in source:
        return []
    done = source["distillation"]
    losses = f"{done['curve'][0]['loss']:.4f} -> {done['loss']:.4f}"
    return [f"held-out vectors       {losses} of their square is lost, after {done['steps']:,} steps of --distill"]


def _input_tables(
    settings: CompressModel, model: Any, vectors: Any, weights: np.ndarray | None
) -> tuple[CodeTable, Fit]:
    """Fit codes and tables that only the input reads.

    Raises:
        UserError: the model predicts tokens, or no such tables reach the target.
        ValueError: a vector that is not finite, or impossible sizes.
    """
    if model.get_output_embeddings() is not None or hasattr(model, "decoder_bias"):
        raise UserError(
            f"--input-only: {settings.model} is a {type(model).__name__}, which predicts tokens; leave the option out, "
            "or give a sentence encoder or classifier"
        )
    itemsize, matrix = vectors.element_size(), vectors.float().cpu().numpy()
    counted = np.ones(len(matrix)) if weights is None else weights
    if settings.target_error is not None:
        found = fit_to_error(matrix, settings.target_error, counted, itemsize, settings.seed, settings.table_size)
    else:
        if settings.num_tables is not None:
            rows = settings.table_size or min(MOST_ROWS, len(matrix))
            form = InputForm(settings.num_tables, rows, rotate=False)
        else:
            ratio = TARGET_RATIO if settings.target_ratio is None else settings.target_ratio
            form = form_of_ratio(ratio, len(matrix), matrix.shape[1], itemsize, settings.table_size)
        found = fit_form(matrix, form, counted, settings.seed)
    found[0].metadata["vectors"] = f"input embeddings of model {Path(settings.model).name}"
    return found


def _to_target(
    settings: CompressModel,
    table: CodeTable,
    model: Any,
    vectors: np.ndarray,
    weights: np.ndarray | None,
    itemsize: int,
) -> tuple[CodeTable, list[Fit] | None]:
    """Dedicate tokens until --target-ratio or --target-error is met; return the codes, and the tables fitted so far.

    Raises:
        UserError: the tables alone take more than --target-ratio allows, or --target-error saves no bytes.
        ValueError: as `fit_tables`.
    """
    from ksub_ds.model.replacement import decoder_matrix

    if settings.target_ratio is None and settings.target_error is None:
        return table, None
    own = decoder_matrix(model)
    matrices = [vectors] if own is None else [vectors, own[: len(vectors)].float().cpu().numpy()]
    if settings.target_error is not None:
        return dedicate_to_error(table, matrices, settings.target_error, itemsize, settings.mixing, weights)
    assert settings.target_ratio is not None
    return dedicate_to_ratio(table, matrices, settings.target_ratio, itemsize, settings.mixing, weights)


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
            pass  # a tokenizer without an end token, say
    tokenizer.save_pretrained(target)


def _codes(settings: CompressModel, vectors: Any) -> CodeTable:
    if settings.codes is None:
        from ksub_ds.codes.clustering import clustered_codes

        tables, rows = settings.num_tables or 3, settings.table_size or 128
        table = clustered_codes(vectors, tables, rows, seed=settings.seed, axes=AXES, iterations=ITERATIONS)
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
    from ksub_ds.pretrain.prefetch import to_tensors

    assert settings.data is not None
    if not _predicts_masked_tokens(model):
        raise UserError(f"--data: {settings.model} is a {type(model).__name__}, which predicts no masked tokens")
    dataset = ShardDataset.open(settings.data)
    check_shards(dataset, encoder, tokenizer)
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
