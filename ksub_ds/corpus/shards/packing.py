"""Packing: documents of token ids to rows of one length.

    stream:  document </s> document </s> document ...
    row:     <s>  sequence_length - 2 tokens of the stream  </s>

This is RoBERTa's FULL-SENTENCES (Liu et al. 2019, section 4.2): rows are filled from one document
after another of the same language, with a separator between documents and no next-sentence pairs. One
difference: rows are cut at the token, not at the end of a sentence, so every row is full and
no token is lost; a row may begin inside a sentence, or with the separator. Only the last row of a language and split is
shorter; it ends in `<pad>` after its `</s>`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """The form of a row.

    Attributes:
        sequence_length: T tokens, `<s>` and `</s>` included; at least 3.
        bos_id: of `<s>`.
        eos_id: of `</s>`.
        pad_id: of `<pad>`.
    """

    sequence_length: int
    bos_id: int
    eos_id: int
    pad_id: int


class Packer:
    """Packs the documents of one language and split, in the order in which they are added."""

    def __init__(self, packing: Packing):
        assert packing.sequence_length >= 3, "a row holds <s>, </s> and at least one token"
        self.sequence_length = packing.sequence_length
        self._bos_id, self._eos_id, self._pad_id = packing.bos_id, packing.eos_id, packing.pad_id
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
        row = np.full((1, self.sequence_length), self._pad_id, dtype=np.int32)
        end = len(self._rest) + 1
        row[0, 0], row[0, 1:end], row[0, end] = self._bos_id, self._rest, self._eos_id
        self._rest = self._rest[:0]
        return row

    def _frame(self, bodies: np.ndarray) -> np.ndarray:
        rows = np.empty((len(bodies), self.sequence_length), dtype=np.int32)
        rows[:, 0], rows[:, 1:-1], rows[:, -1] = self._bos_id, bodies, self._eos_id
        return rows
