"""Estimate the time of each stage and the disk that a run needs, from a sample of its input; nothing is written."""

import gzip
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import format_seconds
from ksub_ds.corpus.commoncrawl.dedup import Mode, hash_paragraphs, keep_mask, paragraph_mask
from ksub_ds.corpus.commoncrawl.documents import Document
from ksub_ds.corpus.commoncrawl.inputs import WetFile
from ksub_ds.corpus.commoncrawl.page_selection import Counts, Selection, keep_paragraphs, select_batch
from ksub_ds.corpus.commoncrawl.wet import Page, read_wet
from ksub_ds.corpus.tokenizers.loading import Tokenizer

SAMPLE_BYTES = 6_000_000  # of text, from the beginnings of so many files:
SAMPLE_FILES = 3


def estimate(
    files: Sequence[WetFile],
    total_bytes: int,
    selection: Selection,
    tokenizer: Tokenizer,
    mode: Mode,
    num_ranks: int,
    with_text: bool,
    out: Path,
) -> str:
    """Return the estimate as text.

    Args:
        files: the files to sample.
        total_bytes: of the whole input, compressed.
        selection: what decides which pages stay.
        tokenizer: the tokenizer.
        mode: of deduplication.
        num_ranks: of the run.
        with_text: whether CCNet's JSON lines are written too.
        out: where the run would write; for the free space.

    Raises:
        UserError: no page in the sample.
    """
    sample = _measure(files, selection, tokenizer, mode, with_text)
    factor = total_bytes / max(sample.compressed, 1)
    free = shutil.disk_usage(_existing(out)).free
    need = sum(sample.disk.values()) * factor
    seconds = {name: value * factor / num_ranks for name, value in sample.seconds.items()}
    report = [
        f"sample: {sample.pages:,} pages, {sample.characters / 1e6:.1f} M characters, "
        f"from {sample.compressed / 1e6:.2f} of {total_bytes / 1e6:,.1f} MB",
        f"kept: about {sample.kept * factor:,.0f} of {sample.pages * factor:,.0f} pages, "
        f"{sample.tokens * factor / 1e6:,.2f} M tokens (fewer when paragraphs repeat further apart than in the sample)",
        f"time on {num_ranks} rank{'s' * (num_ranks > 1)}: about {format_seconds(sum(seconds.values()))}",
        *(f"  {name:<24}{format_seconds(value):>12}" for name, value in seconds.items()),
        f"disk: about {_size(need)} at the most; {_size(free)} are free" + (" - NOT ENOUGH" if need > free else ""),
        *(f"  {name:<24}{_size(value * factor):>12}" for name, value in sample.disk.items()),
    ]
    return "\n".join(report)


@dataclass(frozen=True)
class _Sample:
    """What a sample of the pages holds and costs.

    Attributes:
        pages, characters: of all of it.
        compressed: bytes that were read for it.
        kept, tokens: of the pages that stay.
        seconds: of each stage, on this rank.
        disk: bytes of each kind of file.
    """

    pages: int
    characters: int
    compressed: int
    kept: int
    tokens: int
    seconds: dict[str, float]
    disk: dict[str, float]


def _measure(
    files: Sequence[WetFile], selection: Selection, tokenizer: Tokenizer, mode: Mode, with_text: bool
) -> _Sample:
    """Send a sample through all stages.

    Raises:
        UserError: no page in the sample.
    """
    import pyarrow as pa

    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    hash_paragraphs(["warm"])
    tokenizer.encode_batch(["warm"])
    selection.identifier.identify(["warm"])
    pages, compressed = timed("read twice", lambda: _read_sample(files))
    if not pages:
        raise UserError("--dry-run: the sample holds no page; look at the input, or run without --dry-run")
    seconds["read twice"] *= 2
    lines = [line for page in pages for line in page.text.split("\n")]
    documents = [document for page in pages if (document := keep_paragraphs(page, None)) is not None]
    if mode != "off":
        hashes = timed("hash and deduplicate", lambda: hash_paragraphs(lines))
        documents = timed("hash and deduplicate", lambda: _deduplicated(pages, hashes, mode))
    counts: Counts = {}
    kept = timed("identify and filter", lambda: select_batch(documents, selection, counts))
    texts = [document.text for document in kept]
    tokens = sum(map(len, timed("tokenise", lambda: tokenizer.encode_batch(texts))))
    raw = "\n".join(texts).encode()
    stored = len(timed("store", lambda: pa.Codec("zstd", compression_level=1).compress(raw, asbytes=True)))
    disk = {
        "work: hashes": 16 * len(lines) if mode != "off" else 0,
        "work: documents": stored,
        "work: tokens": 4 * tokens,
        "shards": 4.02 * tokens,
    }
    if with_text:
        disk["text (gzip)"] = len(timed("write text", lambda: gzip.compress(raw, 6, mtime=0)))
    characters = sum(len(page.text) for page in pages)
    return _Sample(len(pages), characters, compressed, len(kept), tokens, seconds, disk)


def _read_sample(files: Sequence[WetFile]) -> tuple[list[Page], int]:
    """Return pages from the beginnings of some files, and how many compressed bytes they take."""
    chosen = list(files)
    if len(files) > SAMPLE_FILES:
        chosen = [files[len(files) * index // SAMPLE_FILES] for index in range(SAMPLE_FILES)]
    pages, taken = [], 0
    for file in chosen:
        size, last = 0, None
        for item in read_wet(file.path):
            if isinstance(item, Page) and item.text:
                pages.append(item)
                size += len(item.text.encode())
                last = item.offset
            if size > SAMPLE_BYTES // len(chosen):
                # A single member has no offsets inside: assume that text compresses to a third.
                taken += min(last or size // 3, file.size)  # inside other compressions an offset is of the content
                break
        else:
            taken += file.size
    return pages, taken


def _deduplicated(pages: list[Page], hashes: np.ndarray, mode: Mode) -> list[Document]:
    bits = keep_mask(np.unique(hashes), mode)
    kept = paragraph_mask(hashes, bits, mode)
    ends = np.cumsum([page.text.count("\n") + 1 for page in pages])
    parts = np.split(kept, ends[:-1])
    found = (keep_paragraphs(page, part.tobytes()) for page, part in zip(pages, parts, strict=True))
    return [document for document in found if document is not None]


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1000
    return f"{count:,.1f} TB"
