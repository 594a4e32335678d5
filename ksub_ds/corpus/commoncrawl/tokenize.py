"""From documents to shards: tokenise the documents of each WET file, then pack each language's from all files.

In between there is an Arrow file for each WET file; each of its record batches holds documents of one language and
split (column `ids`: list<int32>). Tokenising, the slow part, goes file by file; packing only copies.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.files import atomic_folder, atomic_path, read_json, write_json
from ksub_ds.corpus.commoncrawl.documents import read_documents
from ksub_ds.corpus.commoncrawl.page_selection import Counts, count
from ksub_ds.corpus.commoncrawl.stages import StageKey
from ksub_ds.corpus.shards.folder import is_whole
from ksub_ds.corpus.shards.packing import Packing
from ksub_ds.corpus.shards.writer import LanguageWriter, split_of
from ksub_ds.corpus.tokenizers.loading import Tokenizer

TOKENS_HELD = 1 << 20  # of one language and split, before they are written: 30 times 4 MiB at most
DOCUMENT_TOKENS = 50  # memory of a document besides its tokens


def tokenise_file(documents: Path, tokens: Path, *, tokenizer: Tokenizer, validation_fraction: float) -> dict[str, Any]:
    """Tokenise one file's documents.

    Args:
        documents: of the stage select.
        tokens: the file to write.
        tokenizer: the tokenizer.
        validation_fraction: share of the documents that goes to the split "validation".

    Returns:
        "counts", and "batches": language, split and bytes of text of each record batch of `tokens`.
    """
    import pyarrow as pa

    schema = pa.schema({"ids": pa.list_(pa.int32())})
    counts: Counts = {}
    batches: list[tuple[str, str, int]] = []
    held: dict[tuple[str, str], _Held] = {}
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(tokens))
        stream = stack.enter_context(pa.ipc.new_file(str(temporary), schema))

        def flush(key: tuple[str, str]) -> None:
            encoded, size = held.pop(key).take()
            offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
            ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(encoded)))
            stream.write_batch(pa.RecordBatch.from_arrays([ids], schema=schema))
            batches.append((*key, size))

        for columns in read_documents(documents, ("raw_content", "language")):
            texts = columns["raw_content"]
            for text, language, ids in zip(texts, columns["language"], tokenizer.encode_batch(texts), strict=True):
                raw = text.encode()
                count(counts, "tokenise", language, len(raw), len(raw) if len(ids) else None)
                if len(ids):
                    key = language, split_of(raw, validation_fraction)
                    if held.setdefault(key, _Held()).add(ids, len(raw)) >= TOKENS_HELD:
                        flush(key)
        for key in sorted(held):
            flush(key)
    return {"counts": counts, "batches": batches}


class _Held:
    """Documents of one language and split, waiting to be written."""

    def __init__(self) -> None:
        self._documents: list[np.ndarray] = []
        self._tokens = self._bytes = 0

    def add(self, ids: np.ndarray, size: int) -> int:
        """Add a document whose text has `size` bytes; return how many tokens' memory is held."""
        self._documents.append(ids)
        self._tokens += len(ids) + DOCUMENT_TOKENS
        self._bytes += size
        return self._tokens

    def take(self) -> tuple[list[np.ndarray], int]:
        """Return the documents and the bytes of their text."""
        return self._documents, self._bytes


def is_packed(out: Path, language: str, key: StageKey) -> bool:
    """Return whether a language's shards are there, whole, and of this key.

    Args:
        out: the shards folder.
        language: its code.
        key: what the shards must have been made with.
    """
    path = out / language / "part.json"
    if not path.is_file():
        return False
    part = read_json(path)
    return part["recipe"] == key and all(is_whole(out / file["path"], file["sha256"]) for file in part["files"])


def pack_language(
    out: Path, language: str, key: StageKey, packing: Packing, sources: Sequence[tuple[Path, dict[str, Any]]]
) -> None:
    """Pack one language's tokens into `out`/<language>/.

    Args:
        out: the shards folder.
        language: which to pack.
        key: what decides the result, kept in part.json.
        packing: the form of a row.
        sources: each file's tokens and what tokenise_file returned, in order.
    """
    with atomic_folder(out / language) as folder:
        writer = LanguageWriter(folder, language, packing)
        dropped = 0
        for path, result in sources:
            row = result["counts"].get("tokenise", {}).get(language, [0, 0, 0, 0])
            dropped += row[0] - row[2]
            for split, size, documents in _batches(path, result["batches"], language):
                writer.add(split, documents, size)
        part = writer.finish()
        files = part.pop("files")
        skipped = {"no_token": dropped} if dropped else {}
        write_json(folder / "part.json", {"recipe": key, **part, "skipped": skipped, "files": files})


def _batches(
    path: Path, batches: Sequence[Sequence[Any]], language: str
) -> Iterator[tuple[str, int, list[np.ndarray]]]:
    """Yield (split, bytes of text, documents) of each record batch of a language."""
    import pyarrow as pa

    wanted = [number for number, (each, _, _) in enumerate(batches) if each == language]
    if not wanted:
        return
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as stream:
        for number in wanted:
            _, split, size = batches[number]
            column = stream.get_batch(number).column("ids")
            ids = column.values.to_numpy(zero_copy_only=True)
            yield split, size, np.split(ids, column.offsets.to_numpy()[1:-1])
