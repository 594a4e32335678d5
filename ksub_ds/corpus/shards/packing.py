"""Packing: documents, or pairs of sentences, of token ids to rows of one length.

    stream:  document </s> document </s> document ...
    row:     <s>  sequence_length - 2 tokens of the stream  </s>

This is RoBERTa's FULL-SENTENCES (Liu et al. 2019, section 4.2): rows are filled from one document
after another of the same language, with a separator between documents and no next-sentence pairs. One
difference: rows are cut at the token, not at the end of a sentence, so every row is full and
no token is lost; a row may begin inside a sentence, or with the separator. Only the last row of a language and split is
shorter; it ends in `<pad>` after its `</s>`, or in more `</s>` where the tokenizer has no `<pad>`.

    pair:    <s> sentence </s> </s> translation </s>
    row:     pair pair ... pair <pad> <pad>

Pairs, for translation language modelling (Lample & Conneau 2019, section 3.3), stay whole: half a pair is not a
translation. Their form is RoBERTa's of two sentences.
"""

from dataclasses import dataclass

import numpy as np

OPEN_ROWS = 64  # that a pair may go to


@dataclass(frozen=True)
class Packing:
    """The form of a row.

    Attributes:
        sequence_length: T tokens, `<s>` and `</s>` included; at least 3.
        bos_id: of `<s>`.
        eos_id: of `</s>`.
        pad_id: of `<pad>`; None where there is none.
    """

    sequence_length: int
    bos_id: int
    eos_id: int
    pad_id: int | None

    @property
    def filler(self) -> int:
        """The token that fills a row up."""
        return self.eos_id if self.pad_id is None else self.pad_id

    def padding(self, rows: np.ndarray) -> np.ndarray:
        """Return where rows (B, T) are filled up, (B, T) bool.

        Without `<pad>` that is what follows the first of three and more `</s>` at the end. Two are what any row may end
        in: a separator and the row's own.
        """
        if self.pad_id is not None:
            return rows == self.pad_id
        ends = np.logical_and.accumulate(rows[:, ::-1] == self.eos_id, axis=1)[:, ::-1]
        ends[:, 1:] &= ends[:, :-1]
        ends[:, 0] = False
        ends[ends.sum(axis=1) < 2] = False
        return ends


class Packer:
    """Packs the documents of one language and split, in the order in which they are added."""

    framing = 0  # special tokens among those of a document, as it is added

    def __init__(self, packing: Packing):
        assert packing.sequence_length >= 3, "a row holds <s>, </s> and at least one token"
        self.sequence_length = packing.sequence_length
        self._bos_id, self._eos_id, self._filler = packing.bos_id, packing.eos_id, packing.filler
        self._rest = np.zeros(0, dtype=np.int32)  # tokens that do not fill a row yet
        self._separator = np.array([packing.eos_id], dtype=np.int32)
        self._started = False

    def add(self, documents: list[np.ndarray]) -> np.ndarray:
        """Add non-empty documents and return the rows that they complete, (n, T) int32; n may be 0."""
        parts = [self._rest]
        for document in documents:
            if self._started:
                parts.append(self._separator)
            parts.append(document)
            self._started = True
        stream = np.concatenate(parts)
        body = self.sequence_length - 2
        count = len(stream) // body
        self._rest = stream[count * body :].copy()
        return self._frame(stream[: count * body].reshape(count, body))

    def finish(self) -> np.ndarray:
        """Return the last row, padded: (1, T), or (0, T) when no token is left."""
        body = self.sequence_length - 2
        if not len(self._rest):
            return self._frame(np.zeros((0, body), dtype=np.int32))
        row = np.full((1, self.sequence_length), self._filler, dtype=np.int32)
        end = len(self._rest) + 1
        row[0, 0], row[0, 1:end], row[0, end] = self._bos_id, self._rest, self._eos_id
        self._rest = self._rest[:0]
        return row

    def _frame(self, bodies: np.ndarray) -> np.ndarray:
        rows = np.empty((len(bodies), self.sequence_length), dtype=np.int32)
        rows[:, 0], rows[:, 1:-1], rows[:, -1] = self._bos_id, bodies, self._eos_id
        return rows


class PairPacker:
    """Packs framed pairs (`frame_pair`) of one pair of languages and split, none of them longer than a row.

    A pair goes to the open row that it fills best (best fit), so that a row of 512 tokens wastes some 2 %.
    """

    framing = 4

    def __init__(self, packing: Packing):
        self._length, self._filler = packing.sequence_length, packing.filler
        self._open: list[list[np.ndarray]] = []
        self._room: list[int] = []  # in each open row

    def add(self, documents: list[np.ndarray]) -> np.ndarray:
        """Add framed pairs and return the rows that they complete, (n, T) int32; n may be 0."""
        done = []
        for pair in documents:
            fitting = [index for index, room in enumerate(self._room) if room >= len(pair)]
            if fitting:
                index = min(fitting, key=self._room.__getitem__)
            else:
                if len(self._open) == OPEN_ROWS:
                    done.append(self._close(self._room.index(min(self._room))))
                index = len(self._open)
                self._open.append([])
                self._room.append(self._length)
            self._open[index].append(pair)
            self._room[index] -= len(pair)
            if self._room[index] < self.framing + 2:  # nothing fits any more
                done.append(self._close(index))
        return np.concatenate([np.zeros((0, self._length), np.int32), *done])

    def finish(self) -> np.ndarray:
        """Return the open rows, (n, T)."""
        rows = [self._close(0) for _ in range(len(self._open))]
        return np.concatenate([np.zeros((0, self._length), np.int32), *rows])

    def _close(self, index: int) -> np.ndarray:
        padding = np.full(self._room.pop(index), self._filler, dtype=np.int32)
        return np.concatenate([*self._open.pop(index), padding])[None]


def frame_pair(first: np.ndarray, second: np.ndarray, packing: Packing) -> np.ndarray:
    """Return a pair of sentences with its special tokens, as `PairPacker` takes it.

    Args:
        first: (n,) int32 ids of the sentence.
        second: (m,) int32 ids of its translation.
        packing: the form of a row.
    """
    bos, eos = (np.array([token], dtype=np.int32) for token in (packing.bos_id, packing.eos_id))
    return np.concatenate([bos, first, eos, eos, second, eos])


def pair_positions(rows: np.ndarray, packing: Packing) -> np.ndarray:
    """Return the positions of tokens in rows of pairs, those of a translation starting where its sentence's start.

    So they do in XLM, whose rows are one pair. The next pair of a row comes after the longer side of the one before:
    sentence and translation share their positions with nobody else. A sentence begins where two special tokens meet,
    as text never becomes one.

    Args:
        rows: (B, T) of a `PairPacker`, without masks.
        packing: its form.

    Returns:
        (B, T) int64, from 0; -1 at padding.
    """
    positions = np.full(rows.shape, -1, dtype=np.int64)
    special = (rows == packing.bos_id) | (rows == packing.eos_id)
    begins = special.copy()
    begins[:, 1:] &= special[:, :-1]
    for row, starts, end in zip(positions, begins, (~packing.padding(rows)).sum(axis=1).tolist(), strict=True):
        first = np.flatnonzero(starts)
        lengths = np.diff(first, append=end)
        longer = np.maximum(lengths[::2], lengths[1::2])
        offsets = np.repeat(np.cumsum(longer) - longer, 2)
        row[:end] = np.arange(end) - np.repeat(first - offsets, lengths)
    return positions
