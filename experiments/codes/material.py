"""The data of all configurations: rows over a small vocabulary, vectors of its tokens, codes from the vectors.

The vocabulary is cut to its most frequent tokens, the rest becomes `<unk>`, which is neither predicted nor counted.
All files are written to OUT/material, once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.codes.clustering import clustered_codes
from ksub_ds.codes.positional import plain_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import MANIFEST, ShardDataset, is_shards
from ksub_ds.corpus.statistics import token_frequency
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.vectors.cooccurrence import (
    Cooccurrence,
    count_pairs,
    factorise,
    most_frequent,
    positive_pmi,
)

SEQUENCE_LENGTH = 128
HELD_OUT_ROWS = 24  # of each language
BOS, PAD, EOS, UNK, MASK = range(5)
SPECIAL = (BOS, PAD, EOS, UNK, MASK)
CLUSTERINGS = {
    "clustered-random": {"last_level": "random", "align": False},
    "clustered-matched": {"last_level": "matched", "align": False},
    "clustered-matched-aligned": {"last_level": "matched", "align": True},
}
BLOCK_ROWS = 1 << 13


@dataclass(frozen=True)
class Material:
    """The files that `prepare` made."""

    folder: Path

    def rows(self, split: str) -> np.ndarray:
        """Map the rows of a split, (n, T) int32 ids of the small vocabulary."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)

    def vectors(self) -> np.ndarray:
        """Load the co-occurrence vectors, (N, p)."""
        return np.load(self.folder / "vectors.npy", allow_pickle=False)

    def codes(self, name: str) -> CodeTable:
        """Load the codes of a kind: plain, positional or one of CLUSTERINGS."""
        return CodeTable.load(self.folder / f"{name}.safetensors")


def open_shards(data: Path, tokenizer: Path | None, out: Path) -> ShardDataset:
    """Open a shards folder, or make shards of a folder of text and open them.

    Raises:
        UserError: text without a tokenizer, or shards made with another one.
    """
    if is_shards(data):
        dataset = ShardDataset.open(data)
        if tokenizer is not None:
            from ksub_ds.corpus.tokenizers.loading import load_tokenizer

            dataset.check_tokenizer(load_tokenizer(tokenizer).fingerprint, str(tokenizer))
        return dataset
    if tokenizer is None:
        raise UserError(f"--data {data}: has no {MANIFEST}, so it must be text; give --tokenizer PATH too")
    shard_text(ShardText(data, tokenizer, out / "shards", SEQUENCE_LENGTH, validation_fraction=0.02))
    return ShardDataset.open(out / "shards", verify=False)


def prepare(dataset: ShardDataset, out: Path, num_tokens: int, table_size: int, seed: int) -> Material:
    """Make rows, vectors and codes, unless they are there already.

    Args:
        num_tokens: N of the small vocabulary, special tokens included.
        table_size: M of each of the three tables.
        seed: of vectors and clusterings.

    Raises:
        UserError: OUT has the material of other settings, or there is too little text.
    """
    material = Material(out / "material")
    settings = {
        "data_fingerprint": dataset.fingerprint,
        "num_tokens": num_tokens,
        "table_size": table_size,
        "seed": seed,
    }
    path = material.folder / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise UserError(f"--out {out}: has an experiment with other settings ({path}); give another folder")
    write_json(path, settings)
    if not (material.folder / "validation.npy").exists():
        _make_rows(dataset, material, num_tokens)
    if not (material.folder / "vectors.npy").exists():
        _save(material.folder / "vectors.npy", _vectors(material.rows("train"), num_tokens, seed))
    for name in ("plain", "positional", *CLUSTERINGS):
        if not (material.folder / f"{name}.safetensors").exists():
            get_logger().info(f"codes: {name}")
            _make_codes(name, material, num_tokens, table_size, seed).save(material.folder / f"{name}.safetensors")
    return material


def _make_rows(dataset: ShardDataset, material: Material, num_tokens: int) -> None:
    tokenizer = dataset.manifest["tokenizer"]
    languages = dataset.languages
    train = [dataset.rows("train", language) for language in languages]
    frequency = token_frequency(train, tokenizer["vocab_size"], tuple(tokenizer["special_ids"]))
    kept = most_frequent(frequency, num_tokens - len(SPECIAL))
    if len(kept) + len(SPECIAL) < num_tokens:
        raise UserError(
            f"--num-tokens {num_tokens}: the text has {len(kept)} different tokens; give at most "
            f"{len(kept) + len(SPECIAL)}"
        )
    small = np.full(tokenizer["vocab_size"], UNK, dtype=np.int32)
    small[kept] = len(SPECIAL) + np.arange(len(kept), dtype=np.int32)
    for number, name in enumerate(("bos_id", "pad_id", "eos_id", "unk_id", "mask_id")):
        small[tokenizer[name]] = number
    share = frequency[kept].sum() / frequency.sum()
    get_logger().info(f"vocabulary: {num_tokens:,} tokens cover {share:.1%} of the text")
    held_out = []
    for language in languages:
        available = dataset.num_sequences("validation", language)
        taken = min(HELD_OUT_ROWS, available)
        held_out.append(dataset.gather("validation", np.arange(taken) * available // max(taken, 1), language))
    _save(material.folder / "train.npy", np.concatenate([small[rows] for rows in train]))
    _save(material.folder / "validation.npy", small[np.concatenate(held_out)])


def _vectors(rows: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    settings = Cooccurrence(seed=seed)

    def blocks() -> Any:
        return (rows[first : first + BLOCK_ROWS] for first in range(0, len(rows), BLOCK_ROWS))

    frequency = token_frequency(blocks(), num_tokens, SPECIAL)
    contexts = most_frequent(frequency, settings.contexts)
    counts = count_pairs(blocks(), num_tokens, SPECIAL, contexts, settings.window)
    return factorise(positive_pmi(counts, settings.smoothing), settings.dimensions, seed)


def _make_codes(name: str, material: Material, num_tokens: int, table_size: int, seed: int) -> CodeTable:
    if name == "plain":
        return plain_codes(num_tokens)
    if name == "positional":  # Algorithm 1's digits in the base of the clustered tables, for as many parameters
        digits = np.arange(num_tokens)[:, None] // table_size ** np.arange(3) % table_size
        return CodeTable(digits, (table_size,) * 3, {"algorithm": "positional"})
    return clustered_codes(material.vectors(), 3, table_size, seed=seed, **CLUSTERINGS[name])  # type: ignore[arg-type]


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)
