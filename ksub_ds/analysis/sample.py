"""The text of an analysis: the same number of tokens of each language, as rows for a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.shards.dataset import is_shards
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT, TextLayout
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.sources import find_text

DOCUMENTS_AT_ONCE = 256


class RowTokenizer(Protocol):
    """What rows are made with: any `Tokenizer` of the corpus, or that of a causal model."""

    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    @property
    def pad_id(self) -> int | None:
        """The padding token; without one the end token fills a row up, which attention leaves out."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        ...

    def tokens(self) -> list[str]:
        """Return the N tokens by id, spelt as in the vocabulary."""
        ...


@dataclass(frozen=True)
class TextSample:
    """Rows of token ids.

    Attributes:
        rows: each (n,) int64 with the start and end token around it.
        tokens_per_language: ordinary tokens taken, by language.
        counts: (N,) how often each token type occurs; start and end tokens are not counted.
    """

    rows: list[np.ndarray]
    tokens_per_language: dict[str, int]
    counts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """How many ordinary tokens there are."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class Batch:
    """Rows side by side: (B, T) ids and attention mask, and the (B, T) places of ordinary tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    ordinary: Tensor


def sample_text(
    data: Path,
    languages: tuple[str, ...],
    tokenizer: RowTokenizer,
    num_tokens: int,
    sequence_length: int,
    layout: TextLayout = DEFAULT_LAYOUT,
) -> TextSample:
    """Take the beginning of every document, in order, until each language has its share of tokens.

    Args:
        data: folder of <lang>.jsonl, <lang>.txt, <lang>.parquet... or <lang>/, as sources.py finds them.
        languages: which; empty = all there are.
        tokenizer: the model's.
        num_tokens: in all; a language with less text gives what it has.
        sequence_length: tokens of a row, special ones included.
        layout: how documents lie in the files.

    Raises:
        UserError: no such folder or language, or no text in it.
    """
    if is_shards(data):
        raise UserError(f"--data {data}: holds token shards; give the folder of the text they were made from")
    found = find_text(data, languages, flag="--data")
    share = max(1, num_tokens // len(found))
    rows: list[np.ndarray] = []
    taken: dict[str, int] = {}
    for language, text in found.items():
        start = len(rows)
        _take(DocumentReader(text.sources, text.skipped, layout), tokenizer, share, sequence_length, rows)
        taken[language] = sum(len(row) - 2 for row in rows[start:])
        if not taken[language]:
            why = ", ".join(text.skipped.lines()) or "no document"
            raise UserError(f"--data {data}: language {language!r} has no readable text ({why})")
    ordinary = np.concatenate([row[1:-1] for row in rows])
    return TextSample(rows, taken, np.bincount(ordinary, minlength=tokenizer.vocab_size))


def _take(
    documents: DocumentReader, tokenizer: RowTokenizer, share: int, sequence_length: int, rows: list[np.ndarray]
) -> None:
    left, waiting = share, []
    for text in documents:
        waiting.append(text[: 40 * sequence_length])  # no tokenizer makes tokens of more than 40 characters a piece
        if len(waiting) == DOCUMENTS_AT_ONCE:
            left = _encode(waiting, tokenizer, left, sequence_length, rows)
            waiting = []
            if not left:
                return
    _encode(waiting, tokenizer, left, sequence_length, rows)


def _encode(texts: list[str], tokenizer: RowTokenizer, left: int, sequence_length: int, rows: list[np.ndarray]) -> int:
    """Append rows of `texts` and return how many tokens are still wanted."""
    for ids in tokenizer.encode_batch(texts) if texts else []:
        ids = ids[: min(left, sequence_length - 2)]
        if len(ids):
            rows.append(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.int64))
            left -= len(ids)
    return left


def batches(sample: TextSample, tokenizer: RowTokenizer, batch_size: int) -> list[Batch]:
    """Return all rows as batches, those of similar length together.

    Args:
        sample: the rows.
        tokenizer: by which they were made; pads them.
        batch_size: rows of a batch; the last one may have fewer.
    """
    order = sorted(range(len(sample.rows)), key=lambda index: (len(sample.rows[index]), index))
    made = []
    for start in range(0, len(order), batch_size):
        rows = [sample.rows[index] for index in order[start : start + batch_size]]
        shape = (len(rows), max(map(len, rows)))
        filler = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        input_ids_BT = np.full(shape, filler, dtype=np.int64)
        attention_BT, ordinary_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        for index, row in enumerate(rows):
            input_ids_BT[index, : len(row)] = row
            attention_BT[index, : len(row)] = 1
            ordinary_BT[index, 1 : len(row) - 1] = True
        made.append(Batch(*map(torch.from_numpy, (input_ids_BT, attention_BT, ordinary_BT))))
    return made
