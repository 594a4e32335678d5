"""What a run over Common Crawl tells: quarantine.jsonl, report.json, and the line it ends with.

Nothing in these files depends on time, paths of the output, or the number of ranks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksub_ds.common.files import atomic_path
from ksub_ds.corpus.crawl_input import WetFile
from ksub_ds.corpus.crawl_pages import Counts

STAGES = ("read", "dedup", "language", "quality", "length", "tokenise")
_NAMES = ("documents_in", "bytes_in", "documents_out", "bytes_out")
_DROPPED_BY = {
    "read": "without text",
    "dedup": "by deduplication",
    "language": "by language",
    "quality": "by perplexity",
    "length": "by length",
    "tokenise": "without a token",
}


def write_quarantine(path: Path, parts: Sequence[Path]) -> None:
    """Join every file's faults, in the order of the files."""
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, out)


def build_report(
    head: dict[str, Any],
    files: Sequence[WetFile],
    reads: Sequence[dict[str, Any]],
    selected: Sequence[dict[str, Any]],
    tokens: Sequence[dict[str, Any]],
    languages: dict[str, Any],
) -> dict[str, Any]:
    """report.json: documents and bytes in and out, per stage, language and file.

    Args:
        head: what it begins with.
        reads, selected, tokens: the results of these stages, per file.
        languages: the manifest's entries.
    """
    entries, totals = [], {stage: {} for stage in STAGES}  # type: tuple[list[dict[str, Any]], Counts]
    for file, read, select, token in zip(files, reads, selected, tokens, strict=True):
        counts = {stage: {} for stage in STAGES} | read["counts"] | select["counts"] | token["counts"]
        for stage in STAGES:
            for language, row in counts[stage].items():
                total = totals[stage].setdefault(language, [0, 0, 0, 0])
                total[:] = [a + b for a, b in zip(total, row, strict=True)]
        entries.append(
            {
                "file": file.name,
                "bytes": file.size,
                "sha256": read["sha256"],
                "quarantined": read["faults"],
                "other_records": read["other"],
                "paragraphs_in": read["paragraphs"],
                "paragraphs_out": select["paragraphs"],
                "stages": _spelt(counts),
            }
        )
    return {
        **head,
        "quarantined": sum(entry["quarantined"] for entry in entries),
        "quarantined_files": sum(entry["quarantined"] > 0 for entry in entries),
        "paragraphs_in": sum(entry["paragraphs_in"] for entry in entries),
        "paragraphs_out": sum(entry["paragraphs_out"] for entry in entries),
        "stages": _spelt(totals),
        "shards": {
            language: {split: entry[split] for split in ("train", "validation")}
            for language, entry in languages.items()
        },
        "files": entries,
    }


def _spelt(counts: Counts) -> dict[str, Any]:
    return {
        stage: {language: dict(zip(_NAMES, row, strict=True)) for language, row in sorted(counts[stage].items())}
        for stage in STAGES
    }


def exit_line(report: dict[str, Any]) -> str:
    """How many pages were kept, dropped by each stage, quarantined."""

    def total(stage: str, name: str) -> int:
        return sum(row[name] for row in report["stages"][stage].values())

    dropped = [
        f"{total(stage, 'documents_in') - total(stage, 'documents_out'):,} {words}"
        for stage, words in _DROPPED_BY.items()
    ]
    return (
        f"kept {total('tokenise', 'documents_out'):,} of {total('read', 'documents_in'):,} pages "
        f"({total('tokenise', 'bytes_out') / 1e6:,.1f} of {total('read', 'bytes_in') / 1e6:,.1f} MB); "
        f"dropped {', '.join(dropped)}; "
        f"quarantined {report['quarantined']:,} in {report['quarantined_files']:,} of {len(report['files']):,} files"
    )
