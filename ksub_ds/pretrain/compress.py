"""From a trained model's folder to a small one: `ksub compress`.

    ksub compress plain_model --num-tables 3 --table-size 128 --out small_model

SMALL_MODEL holds the weights, the codes (also as codes.safetensors), the tokenizer and compression.json. Next:
`ksub pretrain --warm-start small_model`, with or without `--distill-from plain_model`.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, write_json
from ksub_ds.common.logging import get_logger

# How sentence-transformers puts an encoder to use; small JSON files that stay true for the compressed one.
SENTENCE_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "2_Normalize/config.json"),
)


@dataclass(frozen=True)
class CompressModel:
    """Put k small tables in the place of a trained model's embedding, fitted to it by least squares."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder (or Hub name): BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, ModernBERT, or an export of
    `ksub pretrain --plain`."""
    out: Path
    """Folder to write."""
    num_tables: int = 3
    """K, how many tables replace the embedding."""
    table_size: int = 128
    """M, the rows of every table."""
    codes: Path | None = None
    """Code file to use. [codes by clustering the model's own embedding, K tables of M rows]"""
    mixing: Literal["linear", "orthogonal", "none"] = "linear"
    """A fixed d x d matrix beside the tables: any, a rotation, or none."""
    data: Path | None = None
    """Shards folder made with the model's tokenizer: the masked-token loss on its held-out part, before and after."""
    sequences: int = 64
    """Held-out sequences per language for that loss."""
    seed: int = 0
    """Of the clustering."""


def compress_model(settings: CompressModel) -> Path:
    """Compress a model and write its folder.

    Returns:
        The folder.

    Raises:
        UserError: the model cannot be read or compressed, codes or data do not fit it, or a folder is in the way.
    """
    from ksub_ds.model.compress import compress_with_report, open_model
    from ksub_ds.model.convert import embedding_matrix

    out, log = settings.out, get_logger()
    if out.exists() and not (out / "compression.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not a compressed model and not empty; choose another folder")
    if settings.sequences < 1:
        raise UserError(f"--sequences {settings.sequences}: must be at least 1")
    model = open_model(settings.model)
    tokenizer = _tokenizer(settings.model)
    loss = _masked_loss(settings, model, tokenizer) if settings.data is not None else None
    try:
        vectors = embedding_matrix(model)
        if tokenizer is not None and len(tokenizer) < len(vectors):
            log.info(f"{settings.model}: {len(vectors) - len(tokenizer):,} rows beyond the tokenizer's left out")
            vectors = vectors[: len(tokenizer)]
        table = _codes(settings, vectors.float().cpu().numpy())
        small, report = compress_with_report(model, table, settings.mixing, loss=loss)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{settings.model}: {error}") from error
    with atomic_folder(out) as temporary:
        small.save_pretrained(temporary)
        table.save(temporary / "codes.safetensors")
        _save_tokenizer(Path(settings.model), tokenizer, temporary)
        copy_sentence_files(Path(settings.model), temporary)
        source = {"model": settings.model, "codes_sha256": table.sha256}
        write_json(temporary / "compression.json", source | report.to_json())
    for line in report.lines():
        log.info(line)
    log.info(f"{out}: written. Next: ksub pretrain --warm-start {out}")
    return out


def _tokenizer(name: str) -> Any:
    """The tokenizer that lies with the model; None, with a line of warning, if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        reason = str(error).strip().split("\n")[0][:160]
        get_logger().warning(f"{name}: no tokenizer that transformers opens ({reason}); the new folder has none")
        return None


def _save_tokenizer(source: Path, tokenizer: Any, target: Path) -> None:
    """As this project writes it, if it knows the kind: a SentencePiece model stays beside it. Else as transformers."""
    from ksub_ds.corpus.tokenizer import load_tokenizer

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


def _masked_loss(settings: CompressModel, model: Any, tokenizer: Any) -> Callable[[Any], float]:
    """Mean loss over the masked tokens of the held-out part, as a function of a model."""
    from ksub_ds.corpus.batches import HeldOutBatches
    from ksub_ds.corpus.shards import ShardDataset
    from ksub_ds.corpus.tokenizer import load_tokenizer

    assert settings.data is not None
    if not type(model).__name__.endswith("ForMaskedLM"):
        raise UserError(f"--data: {settings.model} is a {type(model).__name__}, which predicts no masked tokens")
    dataset = ShardDataset.open(settings.data)
    if Path(settings.model).is_dir():
        dataset.check_tokenizer(load_tokenizer(settings.model).fingerprint, settings.model)
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
                tensors = {key: torch.from_numpy(array) for key, array in batch.items()}
                labelled = float((tensors["labels"] != -100).sum())
                if labelled:
                    total += float(model(**tensors).loss) * labelled
                    count += labelled
        return total / count

    return measure


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copy what makes a folder one of sentence-transformers, if it is there."""
    for name in SENTENCE_FILES:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
