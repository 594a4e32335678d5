"""The output folder of a run over Common Crawl: whose it is, whether it is finished, what is published in it."""

import multiprocessing
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, read_json, write_json
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.dedup import rule
from ksub_ds.corpus.commoncrawl.filter import Counts, Selection, content_hash
from ksub_ds.corpus.commoncrawl.inputs import WetFile
from ksub_ds.corpus.commoncrawl.stages import fingerprint
from ksub_ds.corpus.shards.dataset import MANIFEST
from ksub_ds.corpus.shards.folder import build_manifest, claim_folder, is_whole, parts, remove_leftovers, save_tokenizer
from ksub_ds.corpus.tokenizers.loading import Tokenizer

# Merged docstring, to be folded in:
# """What a run over Common Crawl tells: quarantine.jsonl, report.json, and the line it ends with.
#
# Nothing in these files depends on time, paths of the output, or the number of ranks.
# """


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


FORMAT = 1  # of the intermediate files and of the report; part of every recipe
REPORT, QUARANTINE, TEXT_INDEX = "report.json", "quarantine.jsonl", "index.json"
SOURCE = "common crawl"  # marks the languages' shards as ours

Results = list[dict[str, Any]]


class CrawlFolder:
    """What a run does to its output folder before and after its stages.

    Attributes:
        essence: the settings that decide the result, without places.
    """

    def __init__(
        self, settings: ShardCC, ranks: MPIComm, files: list[WetFile], tokenizer: Tokenizer, selection: Selection
    ):
        self._settings, self._ranks, self._files, self._tokenizer = settings, ranks, files, tokenizer
        self._out, self._text = settings.out, settings.text_out
        self.essence = {
            "dedup": settings.dedup,
            "paragraphs": None if settings.dedup == "off" else rule(),
            "langid": settings.langid,
            "langid_fingerprint": selection.identifier.fingerprint,
            "perplexity_fingerprint": selection.buckets.fingerprint,
            "languages": list(selection.languages),
            "keep_buckets": list(selection.keep_buckets),
            "min_length": selection.min_length,
            "tokenizer": tokenizer.fingerprint,
            "sequence_length": settings.sequence_length,
            "validation_fraction": settings.validation_fraction,
        }

    def recipe(self, contents: Sequence[str]) -> str:
        """Of the whole result; `contents` are the sha256 of the files."""
        files = [(file.name, file.size, content) for file, content in zip(self._files, contents, strict=True)]
        return fingerprint([FORMAT, self.essence, files])

    def finished(self) -> dict[str, Any] | None:
        """The report of an earlier run that made exactly this, if its output is whole."""
        report = self._ranks.on_main(self._earlier_report)
        if report is None:
            return None
        sizes = [file.size for file in self._files]
        contents = self._ranks.each(sizes, lambda unit: content_hash(self._files[unit]))
        if self.recipe(contents) != report["recipe"]:
            return None
        manifest = read_json(self._out / MANIFEST)
        outputs = [
            (self._out / file["path"], file["sha256"])
            for entry in manifest["languages"].values()
            for file in entry["files"]
        ]
        if self._text is not None:
            index = read_json(self._text / TEXT_INDEX) if (self._text / TEXT_INDEX).is_file() else {}
            if index.get("recipe") != report["recipe"]:
                return None
            outputs += [(self._text / file["path"], file["sha256"]) for file in index["files"]]
        whole = self._ranks.each([1] * len(outputs), lambda unit: is_whole(*outputs[unit]))
        return report if all(whole) else None

    def _earlier_report(self) -> dict[str, Any] | None:
        """The report that lies there with its manifest, both whole."""
        if not all((self._out / name).is_file() for name in (MANIFEST, REPORT, QUARANTINE)):
            return None
        try:
            report = read_json(self._out / REPORT)
            whole = read_json(self._out / MANIFEST) == build_manifest(self._out)
        except (UserError, KeyError, TypeError):
            return None
        return report if whole and isinstance(report, dict) and "recipe" in report else None

    def claim(self) -> None:
        """Make the folders ours; until all is done there is no manifest, so that nobody trains on half of it."""
        remove_leftovers(self._out)
        for path in parts(self._out):
            try:
                source = read_json(path)["recipe"].get("source")
            except (UserError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: is damaged; remove {path.parent} and run again") from error
            if source != SOURCE:
                raise UserError(f"--out {self._out}: holds shards of other text ({path.parent.name}); choose another")
        claim_folder(self._out, self._settings.sequence_length, self._tokenizer)
        self._tokenizer_copy = start_saving(self._out, self._tokenizer)
        for name in (MANIFEST, REPORT, QUARANTINE):
            (self._out / name).unlink(missing_ok=True)
        for folder in (path for path in (self._out / "work").glob("*") if path.is_dir()):
            remove_leftovers(folder)

    def publish(self, quarantine: Sequence[Path], reads: Results, selected: Results, tokens: Results) -> dict[str, Any]:
        """Join the quarantine's parts, write the report and at last the manifest; the report."""
        try:
            self._tokenizer_copy.result()
        except BrokenProcessPool as error:
            raise UserError("copying the tokenizer: its process was killed (out of memory?); rerun") from error
        write_quarantine(self._out / QUARANTINE, quarantine)
        manifest = build_manifest(self._out)
        head = {
            "format": FORMAT,
            "recipe": self.recipe([read["sha256"] for read in reads]),
            "settings": self.essence,
            "shards_fingerprint": manifest["fingerprint"],
        }
        report = build_report(head, self._files, reads, selected, tokens, manifest["languages"])
        write_json(self._out / REPORT, report)
        if manifest["languages"]:
            write_json(self._out / MANIFEST, manifest)
        return report


def start_saving(out: Path, tokenizer: Tokenizer) -> Future[None]:
    """Save the tokenizer's copy beside the stages, in a process of its own.

    The conversion loads transformers, which would stay: 250 MB and some seconds that rank 0 alone would need.
    """
    done: Future[None] = Future()
    if (out / "tokenizer").is_dir() or "transformers" in sys.modules:
        save_tokenizer(out, tokenizer)
        done.set_result(None)
        return done
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a Ctrl-C is this process's alone
    try:
        done = pool.submit(save_tokenizer, out, tokenizer)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool.shutdown(wait=False)
    return done
