"""A document as a causal model reads it: its tokens, what a tokenizer loses of the text, and windows over the tokens.

A document begins with the tokenizer's start token where it has one, else with its end token, which stands between
documents in training (GPT-2, Qwen): then its first token is predicted too. With neither, the first token is not
predicted, and its bytes do not count. No end token is predicted: it is not text.

What a tokenizer drops (blanks, signs that its normaliser rewrites, characters it does not know) costs a model nothing,
though its bytes count: such documents are counted.

A document of n tokens is predicted in windows of at most `window` tokens that the model reads. The first window
predicts all it can. Each later one reads at least `context` tokens again before the first that it predicts, the last
one as many as fit: so no token stands at the beginning of a window as if nothing came before it.
(lm-evaluation-harness rolls its windows in this way, with a context of 1.)
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ksub_ds.corpus.tokenizers.engine import BulkEncoder
from ksub_ds.corpus.tokenizers.huggingface import text_only
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.evaluate.finetune.encoding import open_fast_tokenizer

LONGEST_TOKEN = 4_096  # characters, with the word that it begins


@dataclass(frozen=True)
class Tokens:
    """A document as a model reads it.

    Attributes:
        ids: (n,) int64, the start token first if there is one; all but the first are predicted.
        num_bytes: UTF-8 bytes of the text that the predicted tokens stand for.
        unknown: how many tokens are the unknown one.
        restored: whether the tokens decode to the text again, blanks at its ends apart.
    """

    ids: np.ndarray
    num_bytes: int
    unknown: int
    restored: bool


class CausalTokenizer:
    """Any fast tokenizer of transformers, or a SentencePiece .model in XLM-R's layout.

    Args:
        path: a folder, a .model file, or a name in the hub's cache.

    Raises:
        UserError: transformers cannot open it, or it has no fast form.
    """

    def __init__(self, path: str):
        self._path = path
        source = _open(path)
        self._backend = source.backend_tokenizer
        self.vocab_size = 1 + max(source.get_vocab().values())
        start = source.bos_token_id if source.bos_token_id is not None else source.eos_token_id
        self.start_id = None if start is None else int(start)
        self.end_id = self.start_id if source.eos_token_id is None else int(source.eos_token_id)
        self.start_token = None if start is None else str(source.convert_ids_to_tokens(start))
        self._unknown = source.unk_token_id
        self._encoder = BulkEncoder(self._describe, path)
        self._with_offsets: Any = None  # opened where there is no start token
        definition = json.dumps([self._describe(), self.start_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()

    def _describe(self) -> dict[str, Any]:
        return text_only(json.loads(self._backend.to_str()))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32, without special tokens around it."""
        return self._encoder.encode_batch(texts)

    def tokens(self) -> list[str]:
        """Return the N tokens by id, spelt as in the vocabulary; an id without a token is an empty string."""
        return [self._backend.id_to_token(index) or "" for index in range(self.vocab_size)]

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each document; text that spells a special token is ordinary text."""
        found = []
        start = [] if self.start_id is None else [self.start_id]
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            unscored = self._first_end(text) if self.start_id is None and len(ids) else 0
            found.append(
                Tokens(
                    np.concatenate([start, ids]).astype(np.int64),
                    len(text[unscored:].encode()),
                    0 if self._unknown is None else int((ids == self._unknown).sum()),
                    self._backend.decode(ids.tolist(), skip_special_tokens=False).strip() == text.strip(),
                )
            )
        return found

    def _first_end(self, text: str) -> int:
        """Return where, in characters, the first token of a text ends."""
        from tokenizers import Tokenizer

        if self._with_offsets is None:
            self._with_offsets = Tokenizer.from_str(json.dumps(self._describe()))
        end: int = self._with_offsets.encode(text[:LONGEST_TOKEN], add_special_tokens=False).offsets[0][1]
        return end


def _open(path: str) -> Any:
    """Open a tokenizer by transformers.

    Raises:
        UserError: it cannot be opened, or has no fast form.
    """
    if not Path(path).is_file():
        return open_fast_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(path).save(Path(folder))
        return open_fast_tokenizer(folder)


class Window(NamedTuple):
    """A part of a document: tokens `begin` to `end` - 1 are read, `first` to `end` predicted.

    The state of token i predicts token i + 1, so begin < first <= end.
    """

    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """How many tokens are read."""
        return self.end - self.begin


def windows(length: int, window: int, context: int) -> list[Window]:
    """Divide a document: every token but the first is predicted once.

    Args:
        length: tokens of the document, the one that starts it included.
        window: the most tokens that the model reads at a time.
        context: the fewest tokens read before one that is predicted, where the document has as many.
    """
    assert 1 <= context <= window, "every prediction reads something"
    found = []
    first = 1
    while first < length:
        end = min(window if first == 1 else first - context + window, length - 1)
        found.append(Window(max(0, end - window), first, end))
        first = end + 1
    return found
