"""How often each token occurs, in a shards folder or in text: frequent tokens count more when tables are fitted."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import MANIFEST, ShardDataset
from ksub_ds.corpus.statistics import training_frequency
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.reader import DocumentReader
from ksub_ds.corpus.text.sources import text_below
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

MOST_CHARACTERS = 20_000_000  # of text that is counted: some millions of tokens
DOCUMENTS_AT_ONCE = 256


def read_documents(path: Path, flag: str) -> Iterator[str]:
    """Read the documents of a text file, or of all text files of a folder (reader.py knows the forms).

    Each line of a .txt is one. When the reading ends, lines of the log say what was left out.

    Args:
        path: the file or folder.
        flag: the option that names it, for messages.

    Yields:
        One text at a time.

    Raises:
        UserError: there is no such path, or no document in it.
    """
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    text = text_below([path], path.parent, None)
    documents = iter(DocumentReader(text.sources, text.skipped, TextLayout(line_documents=True)))
    first = next(documents, None)
    if first is None:
        why = "; ".join(text.skipped.lines()) or "no .jsonl, .json, .txt, .parquet or .arrow file"
        raise UserError(f"{flag} {path}: holds no text ({why})")
    try:
        yield first
        yield from documents
    finally:  # also where enough has been read
        for line in text.skipped.lines():
            get_logger().warning(f"{flag} {path}: left out: {line}")


def check_shards(dataset: ShardDataset, encoder: Path | str, tokenizer: Any) -> None:
    """Check that shards were made with a model's tokenizer: by its fingerprint, or of a name on the hub by its size.

    Args:
        dataset: the shards.
        encoder: folder or name of the model.
        tokenizer: of the model, in transformers' form; None without one.

    Raises:
        UserError: they were made with another.
    """
    if Path(encoder).is_dir():
        dataset.check_tokenizer(load_tokenizer(encoder).fingerprint, str(encoder))
    elif tokenizer is not None and len(tokenizer) != dataset.manifest["tokenizer"]["vocab_size"]:
        raise UserError(f"{dataset.folder}: made with another tokenizer than that of {encoder}")


def count_tokens(
    path: Path, tokenizer: Any, num_tokens: int, flag: str = "--counts", encoder: Path | str | None = None
) -> np.ndarray:
    """Count the tokens of a shards folder's training part, or of text, of at most 20 million characters.

    Args:
        path: of the shards, the text file, or the folder of text files.
        tokenizer: of the model, in transformers' form.
        num_tokens: N.
        flag: the option that names the path, for messages.
        encoder: folder or name of the model, whose tokenizer must be that of the shards. [only their size is compared]

    Returns:
        (N,) int64. Special tokens count as often as the tokenizer adds them to a document; in shards, which leave them
        out, as often as the most frequent token.

    Raises:
        UserError: there is no text, or the shards are of another tokenizer.
    """
    if (path / MANIFEST).is_file():
        dataset = ShardDataset.open(path)
        if dataset.manifest["tokenizer"]["vocab_size"] != num_tokens:
            raise UserError(
                f"{flag} {path}: made with a tokenizer of {dataset.manifest['tokenizer']['vocab_size']:,} tokens, "
                f"the model has {num_tokens:,}"
            )
        if encoder is not None and tokenizer is not None:
            check_shards(dataset, encoder, tokenizer)
        counts = training_frequency(dataset)
        counts[list(dataset.manifest["tokenizer"]["special_ids"])] = counts.max()
        return counts
    if path.exists() and tokenizer is None:
        remedy = "; give a shards folder" if flag == "--counts" else ""
        raise UserError(f"{flag} {path}: is text, and the model has no tokenizer that reads it{remedy}")
    counts, left = np.zeros(num_tokens, dtype=np.int64), MOST_CHARACTERS
    documents = read_documents(path, flag)
    while left > 0 and (batch := list(islice(documents, DOCUMENTS_AT_ONCE))):
        left -= sum(map(len, batch))
        ids = np.concatenate([np.asarray(row, np.int64) for row in tokenizer(batch, verbose=False)["input_ids"]])
        counts += np.bincount(ids[ids < num_tokens], minlength=num_tokens)
    return counts
