"""The stages read and select: reading a WET file for the hashes of its paragraphs, and again for the pages to keep.

Reading twice costs less than storing what was read: inflating and checking a page takes a hundredth of the time of
tokenising it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, sha256_file
from ksub_ds.corpus.commoncrawl.dedup import Deduplication, HashFile, hash_paragraphs
from ksub_ds.corpus.commoncrawl.documents import Document, DocumentWriter
from ksub_ds.corpus.commoncrawl.inputs import WetFile
from ksub_ds.corpus.commoncrawl.langid import OTHER, LanguageIdentifier
from ksub_ds.corpus.commoncrawl.perplexity import Buckets
from ksub_ds.corpus.commoncrawl.wet import Fault, Page, read_wet

BATCH_CHARACTERS = 1 << 20  # of text and URLs held at a time
PARAGRAPHS_AT_ONCE = 1 << 18  # hashed: a page can have four million
PAGE_CHARACTERS = 500  # added for each page, so that a batch cannot hold a million pages of one letter
UNKNOWN = "-"  # in place of the language before it is identified

Counts = dict[str, dict[str, list[int]]]
"""Stage -> language -> documents in, bytes in, documents out, bytes out."""


def count(counts: Counts, stage: str, language: str, size_in: int, size_out: int | None) -> None:
    """Add a document to a stage's counts.

    Args:
        counts: of all stages; changed.
        stage: that the document has passed.
        language: of the document.
        size_in: UTF-8 bytes before the stage.
        size_out: UTF-8 bytes after it; None when the stage drops the document.
    """
    row = counts.setdefault(stage, {}).setdefault(language, [0, 0, 0, 0])
    row[0] += 1
    row[1] += size_in
    if size_out is not None:
        row[2] += 1
        row[3] += size_out


@dataclass
class Evidence:
    """What a file holds besides pages, to say why it has none, or not all.

    Attributes:
        types: number of its records that are not pages, by WARC-Type.
        first_fault: the reason of the first fault.
        damaged: number of its parts that are not read.
        first_damage: the reason of the first of them.
    """

    types: dict[str, int] = field(default_factory=dict)
    first_fault: str = ""
    damaged: int = 0
    first_damage: str = ""


def read_file(file: WetFile, quarantine: Path, hashes: Path | None = None) -> dict[str, Any]:
    """Read a file for the first time: write the hashes of all paragraphs (uint64, in order) and its faults.

    Args:
        file: the WET file.
        quarantine: the file to write the faults to, one JSON object {"file", "offset", "reason", ...} a line.
        hashes: the file to write the hashes to; None = no hashes.

    Returns:
        "counts", "faults", "other" (records that are not pages), "paragraphs", and "sha256" of the file and "hashes",
        that of the hashes. Of a file without any page also "types", the number of its records by WARC-Type, and
        "first_fault", the reason of the first. Of a file with parts that are not read also "damaged", their number, and
        "first_damage".
    """
    counts: Counts = {}
    tally = {"faults": 0, "other": 0, "paragraphs": 0}
    found = Evidence()
    digest = hashlib.sha256()
    with ExitStack() as stack:
        faults = stack.enter_context(open(stack.enter_context(atomic_path(quarantine)), "w", encoding="utf-8"))
        stream = stack.enter_context(open(stack.enter_context(atomic_path(hashes)), "wb")) if hashes else None
        waiting: list[str] = []
        size = 0
        for page in _pages(file, counts, tally, faults, found):
            waiting += page.text.split("\n")
            size += len(page.text)
            if size >= BATCH_CHARACTERS:
                _write_hashes(waiting, stream, digest, tally)
                waiting, size = [], 0
        _write_hashes(waiting, stream, digest, tally)
    result = {"counts": counts, **tally, "sha256": content_hash(file), "hashes": digest.hexdigest()}
    if found.damaged:
        result |= {"damaged": found.damaged, "first_damage": found.first_damage}
    return result if "read" in counts else result | {"types": found.types, "first_fault": found.first_fault}


def content_hash(file: WetFile) -> str:
    """Return the sha256 of a file, or "" when it cannot be read."""
    try:
        return sha256_file(file.path)
    except OSError:
        return ""


def _write_hashes(paragraphs: list[str], stream: IO[bytes] | None, digest: Any, tally: dict[str, int]) -> None:
    tally["paragraphs"] += len(paragraphs)
    if stream is None:
        return
    for first in range(0, len(paragraphs), PARAGRAPHS_AT_ONCE):
        block = hash_paragraphs(paragraphs[first : first + PARAGRAPHS_AT_ONCE]).tobytes()
        digest.update(block)
        stream.write(block)


def _pages(
    file: WetFile, counts: Counts, tally: dict[str, int], faults: IO[str] | None, found: Evidence
) -> Iterator[Page]:
    """Yield the pages with text; count the other records, and write the faults."""
    for item in read_wet(file.path):
        if isinstance(item, Page):
            size = len(item.text.encode())
            count(counts, "read", UNKNOWN, size, size if size else None)
            if size:
                yield item
        elif isinstance(item, Fault):
            tally["faults"] += 1
            found.first_fault = found.first_fault or item.reason
            if not item.is_whole:
                found.damaged += 1
                found.first_damage = found.first_damage or item.reason
            if faults is not None:
                entry: dict[str, Any] = {"file": file.name, "offset": item.offset, "reason": item.reason}
                if item.inflated:
                    entry["inflated_offset"] = item.inflated
                if item.url:
                    entry["url"] = item.url
                faults.write(json.dumps(entry, ensure_ascii=False) + "\n")
        else:
            tally["other"] += 1
            found.types[item.kind] = found.types.get(item.kind, 0) + 1


@dataclass(frozen=True)
class Selection:
    """What decides which pages stay.

    Attributes:
        identifier: of the language.
        buckets: language models, for the perplexity.
        languages: the ones to keep.
        keep_buckets: of head, middle, tail, all.
        min_length: characters a page needs after deduplication.
    """

    identifier: LanguageIdentifier
    buckets: Buckets
    languages: tuple[str, ...]
    keep_buckets: tuple[str, ...]
    min_length: int


def select_file(
    file: WetFile,
    sha256: str,
    hashes: HashFile | None,
    documents: Path,
    *,
    deduplication: Deduplication | None,
    selection: Selection,
) -> dict[str, Any]:
    """Read a file again: drop the paragraphs that are not kept, then pages by language, bucket and length.

    Args:
        file: the WET file.
        sha256: of the file when it was read first.
        hashes: of its paragraphs; None without deduplication.
        documents: the file to write (documents.py).
        deduplication: which paragraphs are kept; None = all.
        selection: which pages are kept.

    Returns:
        "counts", and "paragraphs", the number of those that are kept.

    Raises:
        UserError: the file has changed since the first reading.
    """
    if content_hash(file) != sha256:
        raise UserError(f"{file.path}: was changed while this run read it; run again when it no longer changes")
    counts: Counts = {}
    kept = None if deduplication is None or hashes is None else _Mask(deduplication.masks(hashes))
    paragraphs = 0
    with DocumentWriter(documents) as writer:
        batch: list[Document] = []
        size = 0
        for page in _pages(file, {}, {"faults": 0, "other": 0}, None, Evidence()):
            document = keep_paragraphs(page, None if kept is None else kept.take(page.text.count("\n") + 1))
            before = len(page.text.encode())
            count(counts, "dedup", UNKNOWN, before, None if document is None else document.size)
            if document is None:
                continue
            paragraphs += len(document.line_ids)
            batch.append(document)
            size += len(document.text) + len(page.url) + PAGE_CHARACTERS
            if size >= BATCH_CHARACTERS:
                writer.write(select_batch(batch, selection, counts))
                batch, size = [], 0
        writer.write(select_batch(batch, selection, counts))
    return {"counts": counts, "paragraphs": paragraphs}


class _Mask:
    """The masks of a file's blocks as one stream of bytes: 1 for a paragraph that is kept, else 0."""

    def __init__(self, masks: Iterator[np.ndarray]):
        self._masks, self._bits = masks, b""

    def take(self, number: int) -> bytes:
        """Return the next `number` bytes."""
        while len(self._bits) < number:
            self._bits += next(self._masks).tobytes()
        taken, self._bits = self._bits[:number], self._bits[number:]
        return taken


def keep_paragraphs(page: Page, mask: bytes | None) -> Document | None:
    """Return what is left of a page, or None; `mask` has a byte for each line, 0 or 1, and None keeps all."""
    lines = page.text.split("\n")
    line_ids = list(range(len(lines)) if mask is None else compress(range(len(lines)), mask))
    if not line_ids:
        return None
    text = page.text if len(line_ids) == len(lines) else "\n".join([lines[number] for number in line_ids])
    return Document(page, lines[0], len(lines), line_ids, text, len(text.encode()))


def select_batch(batch: list[Document], selection: Selection, counts: Counts) -> list[Document]:
    """Return the documents of a batch that are kept, with language, bucket and perplexity filled in.

    Args:
        batch: documents, with the paragraphs that stay.
        selection: what decides.
        counts: of all stages; changed.
    """
    chosen = []
    answers = selection.identifier.identify([document.text for document in batch]) if batch else []
    for document, (language, score) in zip(batch, answers, strict=True):
        wanted = language != OTHER and language in selection.languages
        size = document.size
        count(counts, "language", language, size, size if wanted else None)
        if not wanted:
            continue
        document.language, document.language_score = language, score
        document.bucket, document.perplexity = selection.buckets.bucket(language, document.text)
        wanted = document.bucket in selection.keep_buckets
        count(counts, "quality", language, size, size if wanted else None)
        if not wanted:
            continue
        wanted = len(document.text) >= selection.min_length
        count(counts, "length", language, size, size if wanted else None)
        if wanted:
            chosen.append(document)
    return chosen
