"""What a run over Common Crawl reports: quarantine.jsonl, report.json, and the line it ends with.

Nothing in these files depends on the time, on the paths of the output, or on the number of ranks.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksub_ds.common.files import atomic_path
from ksub_ds.corpus.commoncrawl.inputs import WetFile
from ksub_ds.corpus.commoncrawl.page_selection import Counts
from ksub_ds.corpus.commoncrawl.stages import Result

FORMAT = 1  # of the intermediate files and of the report; part of every stage's key
REPORT, QUARANTINE = "report.json", "quarantine.jsonl"
STAGES = ("read", "dedup", "language", "quality", "length", "tokenise")
SHOWN = 5  # of the things left out, in the last lines; report.json has all of them
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
    """Join the faults of all files, in the order of the files."""
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, out)


def build_report(
    head: dict[str, Any],
    files: Sequence[WetFile],
    reads: Sequence[Result],
    selected: Sequence[Result],
    tokens: Sequence[Result],
    languages: dict[str, Any],
) -> dict[str, Any]:
    """Return what report.json holds: documents and bytes in and out, by stage, language and file.

    Args:
        head: its first entries.
        files: the WET files.
        reads: results of the stage read, by file.
        selected: results of the stage select, by file.
        tokens: results of the stage tokenise, by file.
        languages: the manifest's entries.
    """
    entries: list[dict[str, Any]] = []
    totals: Counts = {stage: {} for stage in STAGES}
    for file, read, select, token in zip(files, reads, selected, tokens, strict=True):
        counts = {stage: {} for stage in STAGES} | read["counts"] | select["counts"] | token["counts"]
        for stage in STAGES:
            for language, row in counts[stage].items():
                total = totals[stage].setdefault(language, [0, 0, 0, 0])
                total[:] = [a + b for a, b in zip(total, row, strict=True)]
        entry = {
            "file": file.name,
            "bytes": file.size,
            "sha256": read["sha256"],
            "quarantined": read["faults"],
            "other_records": read["other"],
            "paragraphs_in": read["paragraphs"],
            "paragraphs_out": select["paragraphs"],
            "stages": _with_names(counts),
        }
        entry |= {name: read[name] for name in ("damaged", "first_damage") if name in read}
        if not counts["read"]:  # no page at all: say what there is instead
            entry |= {"record_types": read.get("types", {}), "first_fault": read.get("first_fault", "")}
        entries.append(entry)
    return {
        **head,
        "quarantined": sum(entry["quarantined"] for entry in entries),
        "quarantined_files": sum(entry["quarantined"] > 0 for entry in entries),
        "paragraphs_in": sum(entry["paragraphs_in"] for entry in entries),
        "paragraphs_out": sum(entry["paragraphs_out"] for entry in entries),
        "stages": _with_names(totals),
        "shards": {
            language: {split: entry[split] for split in ("train", "validation")}
            for language, entry in languages.items()
        },
        "files": entries,
    }


def _with_names(counts: Counts) -> dict[str, Any]:
    return {
        stage: {language: dict(zip(_NAMES, row, strict=True)) for language, row in sorted(counts[stage].items())}
        for stage in STAGES
    }


def left_out(report: dict[str, Any], languages: Sequence[str]) -> list[str]:
    """Return a line for each thing that is left out: files of the input, parts of a file, a language.

    Args:
        report: what report.json holds; "left_out", where it has that, are lines on files that were not read.
        languages: those asked for.
    """
    read = [entry for entry in report["files"] if entry["stages"]["read"]]
    lines = list(report.get("left_out", ()))
    lines += [_without_page(entry) for entry in report["files"] if not entry["stages"]["read"]]
    missing = [language for language in languages if language not in report["shards"]]
    if missing:
        lines.append(f"no page is kept of {', '.join(_language_counts(report, language) for language in missing)}")
    return lines + [_damaged(entry) for entry in read if entry.get("damaged")]


def _language_counts(report: dict[str, Any], language: str) -> str:
    found = report["stages"]["language"].get(language, {}).get("documents_in", 0)
    return f"{language} ({found:,} found)" if found else language


def _without_page(entry: dict[str, Any]) -> str:
    """Describe a file without a page: its records by WARC-Type, or why none can be read."""
    types, faults = entry.get("record_types", {}), entry["quarantined"]
    count = sum(types.values())
    records = f"{count:,} record{'s' * (count != 1)}"
    if count:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(types.items()))
        what = f"{records}, none a conversion record ({kinds})"
        wrong = next((form for kind, form in (("response", "WARC"), ("metadata", "WAT")) if kind in types), None)
        if wrong:
            what += f"; this is a {wrong} file, give the .warc.wet.gz"
    elif faults:
        what = "no record can be read"
    else:
        what = "holds no record"
    if faults:
        what += f"; {faults:,} quarantined, see {QUARANTINE} (first: {entry.get('first_fault', '')})"
    return f"{_printable(entry['file'])}: {what}"


def _damaged(entry: dict[str, Any]) -> str:
    parts = f"{entry['damaged']:,} damaged part{'s' * (entry['damaged'] != 1)}"
    first = f"(first: {entry['first_damage']})"
    return f"{_printable(entry['file'])}: not read to its end: {parts}, see {QUARANTINE} {first}"


def _printable(name: str) -> str:
    """Return a file's name with control characters escaped: names are the input's, and terminals obey them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def summary(lines: Sequence[str]) -> str:
    """Return lines as one, the first few of them in full."""
    more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])


def exit_line(report: dict[str, Any]) -> str:
    """Return the line that says how many pages were kept, dropped by each stage, and quarantined."""

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
