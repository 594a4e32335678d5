"""One language: documents in, a folder of shards out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.files import atomic_folder, write_json
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.encoding import ParallelEncoder
from ksub_ds.corpus.packing import Packer, Packing
from ksub_ds.corpus.shards import SPLITS, ShardWriter
from ksub_ds.corpus.text import DocumentReader, LanguageText

BATCH_CHARACTERS = 1 << 20  # of text per batch: a second or less of tokenising


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
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "sequences": 0} for split in SPLITS}
    shown = 0
    with atomic_folder(out / language) as folder:
        writers = {split: ShardWriter(folder, language, split, packing.sequence_length) for split in SPLITS}
        packers = {split: Packer(packing) for split in SPLITS}
        for texts, encoded in encoder.encode(_batches(reader)):
            parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
            for document, ids in zip(texts, encoded, strict=True):
                if not len(ids):
                    text.skipped["no_token"] += 1
                    continue
                raw = document.encode()
                split = SPLITS[_is_held_out(raw, recipe["validation_fraction"])]
                parts[split].append(ids)
                count = counts[split]
                count["documents"] += 1
                count["tokens"] += len(ids)
                count["bytes"] += len(raw)
            for split in SPLITS:
                writers[split].write(packers[split].add(parts[split]))
            done = reader.bytes_read // 1000
            progress.advance(done - shown, language=language, tokens=f"{counts['train']['tokens']:,}")
            shown = done
        for split in SPLITS:
            writers[split].write(packers[split].finish())
            writers[split].close()
            counts[split]["sequences"] = sum(file["sequences"] for file in writers[split].files)
        files = [file for split in SPLITS for file in writers[split].files]
        skipped = dict(sorted((+text.skipped).items()))
        write_json(folder / "part.json", {"recipe": recipe, **counts, "skipped": skipped, "files": files})
    progress.advance(text.size() // 1000 - shown, language=language)
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


def _is_held_out(raw: bytes, fraction: float) -> bool:
    """By the document's content, so that equal documents always fall on the same side."""
    digest = hashlib.blake2b(raw.strip(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
