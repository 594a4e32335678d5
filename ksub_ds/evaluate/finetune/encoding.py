"""Sentence pairs as token ids: tokenised once, kept in a cache by fingerprint.

    <s> premise </s></s> hypothesis </s>        XLM-R and RoBERTa; other models bring their own pattern

A pair that is too long loses tokens at the end of the longer sentence first, as `truncation=True` does in
transformers. The ids are those of transformers' tokenizer, whichever of the two ways makes them.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.corpus.tokenizers.location import locate
from ksub_ds.corpus.tokenizers.xlmr import MODEL_NAME, XlmrTokenizer
from ksub_ds.evaluate.data.rows import Rows

FORMAT = "ksub-encoded-1"
_ROWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows, laid end to end.

    Attributes:
        ids: all tokens, int32.
        types: their token types, int8; None for models without.
        ends: (n,) where each row ends in `ids`.
        labels: (n,) float64.
        pad_id: fills a batch.
        cut: how many rows were longer than --max-length, and lost tokens.
    """

    ids: np.ndarray
    types: np.ndarray | None
    ends: np.ndarray
    labels: np.ndarray
    pad_id: int
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, (n,)."""
        return np.diff(self.ends, prepend=0)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the inputs of some rows, (len(rows), longest of them) int64; a mask only if something is padded."""
        ends = self.ends[rows]
        lengths = self.lengths()[rows] if len(rows) > 64 else ends - np.where(rows > 0, self.ends[rows - 1], 0)
        columns = np.arange(lengths.max())
        present = columns < lengths[:, None]
        places = (ends - lengths)[:, None] + columns
        places[~present] = 0
        batch = {"input_ids": np.where(present, self.ids[places], self.pad_id).astype(np.int64)}
        if not present.all():
            batch["attention_mask"] = present.astype(np.int64)
        if self.types is not None:
            batch["token_type_ids"] = np.where(present, self.types[places], 0).astype(np.int64)
        return batch

    def joined(self, others: "list[Encoded]") -> "Encoded":
        """Return these rows, then those of the others."""
        every = [self, *others]
        starts = np.cumsum([0, *(len(each.ids) for each in every[:-1])])
        types = None
        if self.types is not None:
            types = np.concatenate([each.types for each in every if each.types is not None])
        return Encoded(
            np.concatenate([each.ids for each in every]),
            types,
            np.concatenate([each.ends + start for each, start in zip(every, starts, strict=True)]),
            np.concatenate([each.labels for each in every]),
            self.pad_id,
            sum(each.cut for each in every),
        )


@dataclass(frozen=True)
class EncodedRow:
    """The tokens of one row.

    Attributes:
        ids: the tokens.
        types: their token types; empty for models without.
        cut: whether the row was too long and lost tokens.
    """

    ids: list[int]
    types: list[int]
    cut: bool


class PairEncoder(Protocol):
    """Turns rows into token ids."""

    vocab_size: int
    pad_id: int
    fingerprint: str

    def encode(self, first: list[str], second: list[str] | None, max_length: int) -> list[EncodedRow]:
        """Return each row as token ids.

        Args:
            first: sentence of each row.
            second: the other sentence of each row; None for single ones.
            max_length: most tokens of a row, special ones included; longer rows are cut.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that transformers' AutoTokenizer opens."""
        ...


def load_encoder(path: str) -> PairEncoder:
    """Open the encoder of a tokenizer: a folder, a single SentencePiece .model in XLM-R's layout, or a name on the hub.

    Raises:
        UserError: none of these.
    """
    local = locate(path) if Path(path).exists() else Path(path)
    if local.is_file() or (local / MODEL_NAME).is_file():
        tokenizer = load_tokenizer(local)
        if isinstance(tokenizer, XlmrTokenizer):
            return XlmrPairs(tokenizer)
    return HuggingFacePairs(str(local))


class XlmrPairs:
    """Pairs in XLM-R's pattern, by the tokenizer that also encodes the training text."""

    def __init__(self, tokenizer: XlmrTokenizer):
        self._tokenizer = tokenizer
        self.vocab_size, self.pad_id = tokenizer.vocab_size, tokenizer.pad_id
        self.fingerprint = tokenizer.fingerprint

    def encode(self, first: list[str], second: list[str] | None, max_length: int) -> list[EncodedRow]:
        """Do as PairEncoder.encode."""
        begin, end = self._tokenizer.bos_id, self._tokenizer.eos_id
        firsts = [ids.tolist() for ids in self._tokenizer.encode_batch(first)]
        if second is None:
            return [EncodedRow([begin, *ids[: max_length - 2], end], [], len(ids) > max_length - 2) for ids in firsts]
        seconds = [ids.tolist() for ids in self._tokenizer.encode_batch(second)]
        encoded: list[EncodedRow] = []
        for a, b in zip(firsts, seconds, strict=True):
            keep_a, keep_b = longest_first(len(a), len(b), max_length - 4)
            ids = [begin, *a[:keep_a], end, end, *b[:keep_b], end]
            encoded.append(EncodedRow(ids, [], keep_a + keep_b < len(a) + len(b)))
        return encoded

    def save(self, folder: Path) -> None:
        """Do as PairEncoder.save."""
        self._tokenizer.save(folder)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each sentence stay, as in tokenizers' LongestFirst.

    Args:
        first: tokens of the one sentence.
        second: tokens of the other.
        room: most tokens of both together.
    """
    short, long = min(first, second), max(first, second)
    kept_long = min(long, max(short, room - short))
    if short + kept_long > room:
        short, kept_long = room // 2, room - room // 2
    return (short, kept_long) if first <= second else (kept_long, short)


def open_fast_tokenizer(path: str) -> Any:
    """Open a tokenizer of transformers in its fast form, without code of its own.

    Raises:
        UserError: it cannot be opened, or has no fast form.
    """
    from transformers import AutoTokenizer

    from ksub_ds.model.registration import register

    register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = one_line(error)
        raise UserError(
            f"{path}: transformers finds no tokenizer there ({reason}); give --tokenizer FOLDER or a .model file"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{path}: the tokenizer has no fast form (tokenizer.json); convert it with transformers")
    return tokenizer


class HuggingFacePairs:
    """Pairs by any fast tokenizer of transformers, in that model's own pattern."""

    def __init__(self, path: str):
        self._tokenizer = open_fast_tokenizer(path)
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"{path}: the tokenizer has no padding token; add pad_token to tokenizer_config.json")
        self.vocab_size, self.pad_id = len(self._tokenizer), int(self._tokenizer.pad_token_id)
        names = ",".join(self._tokenizer.model_input_names)
        definition = self._tokenizer.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(f"{names}\0{definition}".encode()).hexdigest()

    def encode(self, first: list[str], second: list[str] | None, max_length: int) -> list[EncodedRow]:
        """Do as PairEncoder.encode."""
        made = self._tokenizer(first, second, truncation=True, max_length=max_length, return_attention_mask=False)
        types = made["token_type_ids"] if "token_type_ids" in made else [[]] * len(first)
        cut = [bool(each.overflowing) for each in made.encodings]
        return [EncodedRow(*row) for row in zip(made["input_ids"], types, cut, strict=True)]

    def save(self, folder: Path) -> None:
        """Do as PairEncoder.save."""
        self._tokenizer.save_pretrained(folder)


def cache_folder() -> Path:
    """Return where tokenised rows are kept: $KSUB_CACHE, or ksub_ds in the user's cache folder."""
    base = os.environ.get("KSUB_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksub_ds"


def encode(rows: Rows, encoder: PairEncoder, max_length: int, cache: Path | None = None) -> Encoded:
    """Tokenise rows, or take them from the cache.

    Args:
        rows: what to tokenise.
        encoder: by what.
        max_length: tokens of a row, the special ones included.
        cache: folder of the cache. [`cache_folder()`]
    """
    key = hashlib.sha256(f"{FORMAT}\0{encoder.fingerprint}\0{max_length}\0{rows.fingerprint()}".encode()).hexdigest()
    path = (cache or cache_folder()) / "encoded" / f"{key[:32]}.safetensors"
    encoded = _read(path, encoder.pad_id, len(rows))
    if encoded is None:
        encoded = _encode(rows, encoder, max_length)
        _write(path, encoded)
    if encoded.cut:
        get_logger().info(
            f"{rows.name}: {encoded.cut:,} of {len(rows):,} rows are longer than {max_length} tokens (--max-length) "
            "and are cut"
        )
    return encoded


def _encode(rows: Rows, encoder: PairEncoder, max_length: int) -> Encoded:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    cut = 0
    with Progress(len(rows), "rows", f"tokenising {rows.name}") as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows.part(start, start + _ROWS_AT_ONCE)
            for row in encoder.encode(part.first, part.second, max_length):
                ids.append(np.array(row.ids, np.int32))
                types.append(np.array(row.types, np.int8))
                lengths.append(len(row.ids))
                cut += row.cut
            progress.advance(len(part))
    flat_types = np.concatenate(types)
    return Encoded(
        np.concatenate(ids),
        flat_types if len(flat_types) else None,
        np.cumsum(lengths, dtype=np.int64),
        np.array(rows.labels, np.float64),
        encoder.pad_id,
        cut,
    )


def _read(path: Path, pad_id: int, count: int) -> Encoded | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
        arrays = (stored["ids"], stored.get("types"), stored["ends"], stored["labels"])
        encoded = Encoded(*arrays, pad_id, int(stored["cut"][0]))
    except (OSError, SafetensorError, KeyError):
        return None  # not there, cut short, or of before `cut` was counted: it is made anew
    whole = len(encoded) == len(encoded.labels) == count and encoded.ends[-1] == len(encoded.ids)
    return encoded if whole else None


def _write(path: Path, encoded: Encoded) -> None:
    from safetensors.numpy import save_file

    arrays = {"ids": encoded.ids, "ends": encoded.ends, "labels": encoded.labels, "cut": np.array([encoded.cut])}
    if encoded.types is not None:
        arrays["types"] = encoded.types
    try:
        with atomic_path(path) as temporary:
            save_file(arrays, temporary)
    except (OSError, UserError) as error:  # costs time, nothing else
        get_logger().warning(f"--cache {path.parent}: cannot be written ({error}); the rows are tokenised each time")
