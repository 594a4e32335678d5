"""Make a code file from a source of vectors: `ksub codes cluster` and preprocessing/build_codes.py.

Under mpirun rank 0 reads the vectors and writes the file; the clustering divides its groups over the ranks.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ksub_ds.codes.table import CodeTable, check_code_output
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import USER_ERROR
from ksub_ds.common.logging import get_logger
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.shards.dataset import is_shards
from ksub_ds.vectors.dedicated import DedicatedChoice, choose_tokens, with_dedicated
from ksub_ds.vectors.sources import Description, load_vectors


@dataclass
class ClusterVectors:
    """Make codes by Algorithm 2: hierarchical balanced k-means of a vector per token; similar tokens share codes.

    Under `mpirun -n P` the work is divided over P processes; the codes are the same bit for bit.
    """

    embeddings: str
    """A .npy or .safetensors matrix, a model folder or name, a run, or a shards folder (then: co-occurrence)."""
    out: Path
    """The code file to write (.safetensors)."""
    num_tables: int = 3
    """K, how many tables replace the embedding."""
    table_size: int | None = None
    """M, the rows of every table."""
    table_sizes: tuple[int, ...] = ()
    """M_1 ... M_K, if the tables differ in size. [--table-size for each]"""
    tensor: str | None = None
    """Name of the tensor to take from safetensors files. [the input embedding; an encoder's before a decoder's]"""
    tokenizer: Path | None = None
    """SentencePiece .model or HuggingFace folder of these vectors. [the one beside them, if any]"""
    last_level: Literal["matched", "random"] = "matched"
    """Last codes in a leaf: matched to one codebook of residuals, or at random as in the paper."""
    align: bool = True
    """Number the clusters of all groups alike, so that equal codes mean similar directions."""
    unbalanced: bool = False
    """Use the paper's naive k-means; the last table grows to the largest leaf."""
    axes: int | None = None
    """Cluster in so many leading principal axes of the vectors; `ksub compress` takes 128. [all]"""
    reserve_special_tokens: bool = False
    """Give <s>, </s>, <pad>, <unk>, <mask> rows of their own in every table."""
    dedicated_rows: int | None = None
    """F: give so many tokens a row of their own too, the most frequent ones (--data), or by --dedicated-by-loss."""
    data: Path | None = None
    """Shards folder where --dedicated-rows counts tokens. [--embeddings, if it is one]"""
    dedicated_tokens: Path | None = None
    """In place of --dedicated-rows: a file of token ids, one per line."""
    dedicated_by_loss: Path | None = None
    """Run or model folder: --dedicated-rows takes the tokens where its loss on held-out text is greatest."""
    seed: int = 0
    """Seed of the first centroids, of random last codes, and of co-occurrence vectors."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that cluster groups. [one per core]"""


def build_codes(settings: ClusterVectors) -> CodeTable:
    """Cluster and write the code file; every rank returns the table.

    Args:
        settings: the options of `ksub codes cluster`.

    Raises:
        UserError: on rank 0, naming the setting or the file at fault.
        SystemExit: on the other ranks then, with USER_ERROR; rank 0 reports the error.
    """
    try:
        if not distributed.is_main():
            get_logger().setLevel(logging.ERROR)  # rank 0 reports for all
        return _build(settings)
    except UserError:
        if distributed.is_main():
            raise
        raise SystemExit(USER_ERROR) from None


def _build(settings: ClusterVectors) -> CodeTable:
    from ksub_ds.codes.clustering import clustered_codes

    sizes, choice = _table_sizes(settings), _dedicated_choice(settings)
    ranks = MPIComm()
    vectors, description = ranks.on_main(lambda: _load(settings))
    dedicated: np.ndarray | None = None
    if not choice.is_empty:  # chosen before the minutes of clustering
        fingerprint = description.metadata().get("tokenizer_fingerprint")
        dedicated, how = ranks.on_main(lambda: choose_tokens(choice, len(vectors), fingerprint))
    special_ids: tuple[int, ...] = ()
    if settings.reserve_special_tokens:
        if description.tokenizer is None:
            raise UserError("--reserve-special-tokens: give --tokenizer PATH too, it names the special tokens")
        special_ids = description.tokenizer.special_ids
    try:
        table = clustered_codes(  # every rank, with the same vectors
            vectors,
            settings.num_tables,
            max(sizes),
            balanced=not settings.unbalanced,
            last_level=settings.last_level,
            align=settings.align,
            seed=settings.seed,
            special_ids=special_ids,
            workers=min(settings.workers, len(os.sched_getaffinity(0))),
            table_sizes=sizes,
            axes=settings.axes,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if dedicated is not None:
        table = with_dedicated(table, dedicated, how)
    ranks.on_main(lambda: _measure_and_save(table, vectors, description, settings))
    return table


def _measure_and_save(
    table: CodeTable, vectors: np.ndarray, description: Description, settings: ClusterVectors
) -> None:
    from ksub_ds.codes.quality import measure_quality

    get_logger().info("quality of the codes (`ksub codes inspect` shows it)")
    quality = json.dumps(measure_quality(vectors, table, settings.seed))
    table.metadata.update(description.metadata() | {"quality": quality})
    table.save(settings.out)


def _load(settings: ClusterVectors) -> tuple[np.ndarray, Description]:
    check_code_output(settings.out, (settings.embeddings, settings.tokenizer, settings.dedicated_tokens))
    vectors, description = load_vectors(settings.embeddings, settings.tokenizer, settings.seed, settings.tensor)
    if len(vectors) > 1 and (vectors[0] == vectors[-1]).all() and (vectors == vectors[0]).all():
        raise UserError(
            f"{settings.embeddings}: all its rows are equal; codes of these would say nothing of the tokens"
        )
    most = max(_table_sizes(settings))
    if most > len(vectors):
        raise UserError(f"--table-size {most}: is more than the {len(vectors):,} tokens; a few times N^(1/K) is enough")
    return vectors, description


def _dedicated_choice(settings: ClusterVectors) -> DedicatedChoice:
    data = settings.data
    if settings.dedicated_rows is not None and data is None and settings.dedicated_by_loss is None:
        data = Path(settings.embeddings) if is_shards(settings.embeddings) else None
    choice = DedicatedChoice(settings.dedicated_rows, data, settings.dedicated_tokens, settings.dedicated_by_loss)
    choice.check_data_is_read()
    return choice


def _table_sizes(settings: ClusterVectors) -> tuple[int, ...]:
    if settings.num_tables < 2:
        raise UserError(f"--num-tables {settings.num_tables}: clustering needs at least 2 (1 is the plain embedding)")
    if settings.axes is not None and settings.axes < 1:
        raise UserError(f"--axes {settings.axes}: must be at least 1")
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: must be at least 1")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed {settings.seed}: must lie in 0..{2**32 - 1}")
    if settings.table_size is not None and not settings.table_sizes:
        sizes: tuple[int, ...] = (settings.table_size,) * settings.num_tables
    elif settings.table_size is None and settings.table_sizes:
        sizes = settings.table_sizes
    else:
        raise UserError("give either --table-size M or --table-sizes M_1 ... M_K")
    if len(sizes) != settings.num_tables:
        raise UserError(
            f"--table-sizes {' '.join(map(str, sizes))}: names {len(sizes)} tables, --num-tables is "
            f"{settings.num_tables}"
        )
    if min(sizes) < 1:
        raise UserError(f"--table-size {min(sizes)}: must be at least 1")
    return sizes


def report(table: CodeTable, out: Path) -> str:
    """Return the line that ends the command.

    Args:
        table: the codes.
        out: their file.
    """
    own = f", {table.num_dedicated:,} dedicated rows" if table.num_dedicated else ""
    use = "" if table.unique else "; codes for the input alone: ksub compress ENCODER --codes takes them"
    return f"{out}: {table.num_tokens:,} tokens, tables of {' '.join(map(str, table.table_sizes))} rows{own}{use}"
