"""The output folder of a run over Common Crawl: taking it over, recognising a finished run, publishing the result."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.dedup import rule
from ksub_ds.corpus.commoncrawl.documents import CCNET_NAME
from ksub_ds.corpus.commoncrawl.inputs import WetFile
from ksub_ds.corpus.commoncrawl.page_selection import Selection, content_hash
from ksub_ds.corpus.commoncrawl.report import FORMAT, QUARANTINE, REPORT, build_report, left_out, write_quarantine
from ksub_ds.corpus.commoncrawl.stages import Result, fingerprint
from ksub_ds.corpus.shards.dataset import MANIFEST
from ksub_ds.corpus.shards.folder import (
    build_manifest,
    check_replaced,
    claim_folder,
    is_whole,
    parts,
    remove_leftovers,
    save_tokenizer,
)
from ksub_ds.corpus.tokenizers.loading import Tokenizer

TEXT_INDEX = "index.json"
SOURCE = "common crawl"  # in part.json: this pipeline made the language's shards


class CrawlFolder:
    """What a run does to its output folders (`--out` and `--text-out`) before and after its stages.

    Attributes:
        fingerprint_inputs: the settings and models that decide the result; no paths.
    """

    def __init__(
        self, settings: ShardCC, comm: MPIComm, files: list[WetFile], tokenizer: Tokenizer, selection: Selection
    ):
        self._settings, self._comm, self._files, self._tokenizer = settings, comm, files, tokenizer
        self._out, self._text = settings.out, settings.text_out
        self.fingerprint_inputs = {
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

    def run_fingerprint(self, contents: Iterable[str]) -> str:
        """Return the fingerprint of the whole result; `contents` are the sha256 of the input files."""
        files = [(file.name, file.size, content) for file, content in zip(self._files, contents, strict=True)]
        return fingerprint([FORMAT, self.fingerprint_inputs, files])

    def finished(self) -> dict[str, Any] | None:
        """Return the report of an earlier run that made exactly this result, if its output is whole; else None."""
        report = self._comm.on_main(self._earlier_report)
        if report is None:
            return None
        sizes = [file.size for file in self._files]
        contents = self._comm.each(sizes, lambda unit: content_hash(self._files[unit]))
        if self.run_fingerprint(contents) != report["recipe"]:
            return None
        manifest = read_json(self._out / MANIFEST)
        outputs = [(self._out, file) for entry in manifest["languages"].values() for file in entry["files"]]
        if self._text is not None:
            index = read_json(self._text / TEXT_INDEX) if (self._text / TEXT_INDEX).is_file() else {}
            if index.get("recipe") != report["recipe"]:
                return None
            outputs += [(self._text, file) for file in index["files"]]
        whole = self._comm.each([1] * len(outputs), lambda unit: has_files(outputs[unit][0], [outputs[unit][1]]))
        return report if all(whole) else None

    def _earlier_report(self) -> dict[str, Any] | None:
        """Return the report in the folder if it and the manifest are whole."""
        if not all((self._out / name).is_file() for name in (MANIFEST, REPORT, QUARANTINE)):
            return None
        try:
            report = read_json(self._out / REPORT)
            whole = read_json(self._out / MANIFEST) == build_manifest(self._out)
        except (UserError, KeyError, TypeError):
            return None
        return report if whole and isinstance(report, dict) and "recipe" in report else None

    def claim(self) -> None:
        """Take over `--out`; it has no manifest until all is done, so that nobody trains on half of the data.

        Raises:
            UserError: the folder holds damaged shards, shards of other text or with other settings.
        """
        read = [*self._settings.input, *([self._settings.cache] if self._settings.snapshot else [])]
        read += [self._text] if self._text else []
        made = ("tokenizer", "work", MANIFEST, REPORT, QUARANTINE)
        check_replaced(self._out, self._settings.languages, made, read)
        remove_leftovers(self._out)
        for path in parts(self._out):
            try:
                source = read_json(path)["recipe"].get("source")
            except (UserError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: is damaged; remove {path.parent} and run again") from error
            if source != SOURCE:
                raise UserError(f"--out {self._out}: holds shards of other text ({path.parent.name}); choose another")
        claim_folder(self._out, self._settings.sequence_length, self._tokenizer)
        save_tokenizer(self._out, self._tokenizer)
        for name in (MANIFEST, REPORT, QUARANTINE):
            (self._out / name).unlink(missing_ok=True)
        for folder in (path for path in (self._out / "work").glob("*") if path.is_dir()):
            remove_leftovers(folder)

    def claim_text(self) -> None:
        """Take over `--text-out`, with an index.

        Raises:
            UserError: the folder holds other files.
        """
        folder = self._text
        assert folder is not None, "called with --text-out only"
        if folder.is_dir() and any(folder.iterdir()) and not _is_index(folder / TEXT_INDEX):
            raise UserError(f"--text-out {folder}: holds other files; choose an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if not (folder / TEXT_INDEX).is_file():
            write_json(folder / TEXT_INDEX, {"recipe": None, "files": []})

    def publish_text(self, reads: Sequence[Result], texts: Sequence[Result]) -> None:
        """Remove text of earlier runs and write the index of `--text-out`.

        Args:
            reads: results of the stage read.
            texts: results of the stage text.
        """
        folder = self._text
        assert folder is not None, "called with --text-out only"
        files = [entry for result in texts for entry in result["files"]]
        names = {entry["path"] for entry in files}
        for path in folder.iterdir():
            if CCNET_NAME.fullmatch(path.name) and path.name not in names:
                path.unlink()  # of an earlier run: the folder was claimed
        recipe = self.run_fingerprint(read["sha256"] for read in reads)
        write_json(folder / TEXT_INDEX, {"recipe": recipe, "files": files})

    def publish(
        self,
        quarantine: Sequence[Path],
        reads: Sequence[Result],
        selected: Sequence[Result],
        tokens: Sequence[Result],
    ) -> dict[str, Any]:
        """Write quarantine, report and, last, the manifest; no manifest where --strict refuses the result.

        Args:
            quarantine: the faults of each file.
            reads: results of the stage read.
            selected: results of the stage select.
            tokens: results of the stage tokenise.

        Returns:
            The report.
        """
        write_quarantine(self._out / QUARANTINE, quarantine)
        manifest = build_manifest(self._out)
        head = {
            "format": FORMAT,
            "recipe": self.run_fingerprint(read["sha256"] for read in reads),
            "settings": self.fingerprint_inputs,
            "shards_fingerprint": manifest["fingerprint"],
        }
        report = build_report(head, self._files, reads, selected, tokens, manifest["languages"])
        write_json(self._out / REPORT, report)
        refused = self._settings.strict and left_out(report, self._settings.languages)
        if manifest["languages"] and not refused:
            write_json(self._out / MANIFEST, manifest)
        return report


def has_files(folder: Path, files: Iterable[dict[str, Any]]) -> bool:
    """Return whether all files are in the folder with the content that their entries ("path", "sha256") name."""
    return all(is_whole(folder / file["path"], file["sha256"]) for file in files)


def _is_index(path: Path) -> bool:
    """Return whether a file is the index that `claim_text` writes."""
    try:
        index = read_json(path)
    except UserError:
        return False
    return isinstance(index, dict) and index.keys() == {"recipe", "files"}
