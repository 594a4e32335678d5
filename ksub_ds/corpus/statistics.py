"""Statistics of token shards: Table 7 of the paper for any shards folder, and how often each token occurs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksub_ds.common.logging import Progress
from ksub_ds.corpus.shards.dataset import SPLITS, ShardDataset, read_manifest

BLOCK_TOKENS = 1 << 22  # counted at once: 16 MB of ids
SAMPLE_ROWS = 20_000  # of a language: 10 M tokens in rows of 512, counted in a tenth of a second


def token_frequency(blocks: Iterable[np.ndarray], num_tokens: int, special_ids: tuple[int, ...]) -> np.ndarray:
    """Count how often each of N tokens occurs.

    Args:
        blocks: (B, T) token ids at a time.
        num_tokens: N.
        special_ids: ids that count as absent.

    Returns:
        (N,) int64.
    """
    frequency = np.zeros(num_tokens, dtype=np.int64)
    for ids in blocks:
        frequency += np.bincount(ids.reshape(-1), minlength=num_tokens)
    frequency[list(special_ids)] = 0
    return frequency


def training_frequency(dataset: ShardDataset) -> np.ndarray:
    """Count how often each token occurs in the whole training part, special tokens aside, a few MB at a time.

    Pairs of languages are counted where there is nothing else, as `log_frequency` does.

    Args:
        dataset: opened shards.

    Returns:
        (N,) int64.
    """
    tokenizer = dataset.manifest["tokenizer"]
    rows_per_block = max(1, BLOCK_TOKENS // dataset.sequence_length)
    names = dataset.languages or dataset.pairs
    every = [dataset.num_sequences("train", name) for name in names]
    with Progress(sum(every), "rows", "counting tokens") as progress:

        def blocks() -> Iterator[np.ndarray]:
            for name, available in zip(names, every, strict=True):
                for first in range(0, available, rows_per_block):
                    rows = np.arange(first, min(first + rows_per_block, available))
                    yield dataset.gather("train", rows, name)
                    progress.advance(len(rows))

        return token_frequency(blocks(), tokenizer["vocab_size"], tuple(tokenizer["special_ids"]))


def log_frequency(dataset: ShardDataset, alpha: float) -> np.ndarray:
    """Return the (N,) log frequency of each token in training, relative to the most frequent token, which has 0.

    Counted on rows spread evenly over each language, at most SAMPLE_ROWS of them. Half an occurrence is added to each
    token, so that those not seen, special ones among them, have a finite value.

    Args:
        dataset: opened shards.
        alpha: exponent of language smoothing (batches.py).
    """
    tokenizer = dataset.manifest["tokenizer"]
    num_tokens, special_ids = tokenizer["vocab_size"], tuple(tokenizer["special_ids"])
    names = dataset.languages or dataset.pairs
    sizes = [dataset.num_sequences("train", name) for name in names]
    share = np.array(sizes) ** alpha
    drawn = np.zeros(num_tokens)
    for name, size, weight in zip(names, sizes, share / share.sum(), strict=True):
        sample = dataset.gather("train", np.arange(0, size, max(1, -(-size // SAMPLE_ROWS))), name)
        counts = token_frequency([sample], num_tokens, special_ids)
        drawn += weight * counts / max(1, counts.sum())
    half = 0.5 / (sum(sizes) * dataset.sequence_length)
    return np.log((drawn + half) / (drawn + half).max())


# Table 7 ("CC-15"): tokens in millions, size in GiB.
PAPER = {
    "ar": (181, 1.0), "bg": (193, 1.2), "de": (338, 1.4), "el": (170, 1.0), "en": (802, 3.1),
    "es": (273, 1.1), "fr": (315, 1.2), "hi": (91, 0.7), "ru": (426, 2.8), "sw": (232, 0.8),
    "th": (125, 1.1), "tr": (178, 0.7), "ur": (101, 0.6), "vi": (323, 1.4), "zh": (237, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class LanguageStatistics:
    """The numbers of one language, or of the translations between two, both splits together.

    Attributes:
        language: its code, or the name of the pair.
        documents: that have a token; or pairs.
        sequences: rows of both splits.
        held_out_sequences: rows of the split "validation".
        tokens: tokens of the text, special tokens not counted.
        bytes: UTF-8 bytes of the text.
        skipped: documents and files that could not be read.
    """

    language: str
    documents: int
    sequences: int
    held_out_sequences: int
    tokens: int
    bytes: int
    skipped: int


def corpus_statistics(folder: str | Path, group: str = "languages") -> list[LanguageStatistics]:
    """Return the numbers of a shards folder, from its manifest, sorted by language.

    Args:
        folder: of the shards.
        group: "languages", or "pairs".

    Raises:
        UserError: the folder holds no shards, or its manifest is damaged.
    """
    rows = []
    for language, entry in sorted(read_manifest(Path(folder)).get(group, {}).items()):
        total = {
            key: sum(entry[split][key] for split in SPLITS) for key in ("documents", "sequences", "tokens", "bytes")
        }
        held_out = entry["validation"]["sequences"]
        rows.append(
            LanguageStatistics(language, **total, held_out_sequences=held_out, skipped=sum(entry["skipped"].values()))
        )
    return rows


def corpus_table(folder: str | Path) -> str:
    """Return the numbers of a shards folder as text, beside those of the paper's Table 7.

    Raises:
        UserError: the folder holds no shards, or its manifest is damaged.
    """
    rows = corpus_statistics(folder)
    head = f"{'language':<10}{'documents':>12}{'sequences':>12}{'held out':>10}"
    lines = [
        head
        + f"{'tokens (M)':>12}{'size (GiB)':>12}{'bytes/token':>13}{'skipped':>9}{'paper (M)':>12}{'paper (GiB)':>13}"
    ]
    for row in rows:
        lines.append(_line(row, PAPER.get(row.language)))
    names = ("documents", "sequences", "held_out_sequences", "tokens", "bytes", "skipped")
    total = LanguageStatistics("all", **{name: sum(getattr(row, name) for row in rows) for name in names})
    known = [PAPER[row.language] for row in rows if row.language in PAPER]
    paper = (sum(tokens for tokens, _ in known), sum(size for _, size in known)) if known else None
    lines.append(_line(total, paper))
    pairs = corpus_statistics(folder, "pairs")
    if pairs:
        lines += [f"{'pair':<10}{'pairs':>12}" + lines[0][22:97], *map(_line, pairs)]
    return "\n".join(lines)


def _line(row: LanguageStatistics, paper: tuple[float, float] | None = None) -> str:
    text = f"{row.language:<10}{row.documents:>12,}{row.sequences:>12,}{row.held_out_sequences:>10,}"
    text += (
        f"{row.tokens / 1e6:>12,.2f}{row.bytes / 2**30:>12.4f}{row.bytes / max(row.tokens, 1):>13.2f}{row.skipped:>9,}"
    )
    return text + (f"{paper[0]:>12,}{paper[1]:>13.1f}" if paper else f"{'-':>12}{'-':>13}")
