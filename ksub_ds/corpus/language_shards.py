"""One language: documents in, a folder of shards out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.files import atomic_folder, write_json
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.documents import DocumentReader
from ksub_ds.corpus.encoding import ParallelEncoder
from ksub_ds.corpus.packing import Packer, Packing
from ksub_ds.corpus.shards import SPLITS, ShardWriter
from ksub_ds.corpus.text import LanguageText

BATCH_CHARACTERS = 1 << 20  # of text per batch: a second or less of tokenising


class LanguageWriter:
    """Packs the encoded documents of one language and writes them, each split to files of its own.

    Args:
        folder: where the files go.
        language: their name in the manifest.
        packing: the form of a row.
    """

    def __init__(self, folder: Path, language: str, packing: Packing):
        self._writers = {split: ShardWriter(folder, language, split, packing.sequence_length) for split in SPLITS}
        self._packers = {split: Packer(packing) for split in SPLITS}
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "sequences": 0} for split in SPLITS}

    def add(self, split: str, documents: list[np.ndarray], num_bytes: int) -> None:
        """Add documents (int32 ids, none empty) to a split; `num_bytes` is the size of their text."""
        self._writers[split].write(self._packers[split].add(documents))
        count = self.counts[split]
        count["documents"] += len(documents)
        count["tokens"] += sum(map(len, documents))
        count["bytes"] += num_bytes

    def finish(self) -> dict[str, Any]:
        """Write what is left; the counts and files for part.json."""
        for split in SPLITS:
            self._writers[split].write(self._packers[split].finish())
            self._writers[split].close()
            self.counts[split]["sequences"] = sum(file["sequences"] for file in self._writers[split].files)
        return {**self.counts, "files": [file for split in SPLITS for file in self._writers[split].files]}


def shard_language(
    out: Path,
    language: str,
    text: LanguageText,
    recipe: dict[str, Any],
    packing: Packing,
    encoder: ParallelEncoder,
    progress: Progress,
) -> None:
    """Read, tokenise, pack and write one language; publish `out`/<lang>/ when it is whole.

    Args:
        out: the shards folder.
        text: the language's sources; its `skipped` counts are added to.
        recipe: what decides the result, kept in part.json; "validation_fraction" is read from it.
        progress: in kB of text as it lies on the disk.
    """
    reader = DocumentReader(text.sources, text.skipped)
    shown = 0
    with atomic_folder(out / language) as folder:
        writer = LanguageWriter(folder, language, packing)
        for texts, encoded in encoder.encode(_batches(reader)):
            parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
            sizes = dict.fromkeys(SPLITS, 0)
            for document, ids in zip(texts, encoded, strict=True):
                if not len(ids):
                    text.skipped["no_token"] += 1
                    continue
                raw = document.encode()
                split = split_of(raw, recipe["validation_fraction"])
                parts[split].append(ids)
                sizes[split] += len(raw)
            for split in SPLITS:
                writer.add(split, parts[split], sizes[split])
            done = reader.bytes_read // 1000
            progress.advance(done - shown, language=language, tokens=f"{writer.counts['train']['tokens']:,}")
            shown = done
        part = writer.finish()
        skipped = dict(sorted((+text.skipped).items()))
        files = part.pop("files")
        write_json(folder / "part.json", {"recipe": recipe, **part, "skipped": skipped, "files": files})
    progress.advance(max(text.size() // 1000 - shown, 0), language=language)
    if skipped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.items())
        get_logger().info(f"{language}: skipped documents or files: {reasons}")


def _batches(reader: DocumentReader) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in reader:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_of(raw: bytes, fraction: float) -> str:
    """The split of a document, by its content: equal documents always fall on the same side."""
    digest = hashlib.blake2b(raw.strip(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < fraction * 2**64]
