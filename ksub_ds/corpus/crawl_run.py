"""One run over Common Crawl: the stages in their order, and what each of them depends on."""

import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.common.mpi import Ranks
from ksub_ds.corpus.crawl_documents import write_ccnet
from ksub_ds.corpus.crawl_input import WetFile
from ksub_ds.corpus.crawl_pages import Selection, content_hash, read_file, select_file
from ksub_ds.corpus.crawl_report import build_report, exit_line, write_quarantine
from ksub_ds.corpus.crawl_settings import ShardCC
from ksub_ds.corpus.crawl_tokens import pack_language, tokenise_file
from ksub_ds.corpus.dedup import Deduplication, HashFile, hash_files
from ksub_ds.corpus.packing import Packing
from ksub_ds.corpus.paragraphs import rule
from ksub_ds.corpus.shard_folder import build_manifest, claim_folder, is_whole, remove_leftovers, save_tokenizer
from ksub_ds.corpus.shards import MANIFEST
from ksub_ds.corpus.stages import Recipe, Stages, fingerprint
from ksub_ds.corpus.tokenizer import Tokenizer

FORMAT = 1  # of the intermediate files and of the report; part of every recipe
REPORT, QUARANTINE, TEXT_INDEX = "report.json", "quarantine.jsonl", "index.json"
SOURCE = "common crawl"  # marks the languages' shards as ours

Results = list[dict[str, Any]]


class CrawlRun:
    """Every method is called on all ranks, in the same order."""

    def __init__(
        self, settings: ShardCC, ranks: Ranks, files: list[WetFile], tokenizer: Tokenizer, selection: Selection
    ):
        self._settings, self._ranks, self._files = settings, ranks, files
        self._tokenizer, self._selection = tokenizer, selection
        self._out, self._work, self._text = settings.out, settings.out / "work", settings.text_out
        self._sizes = [file.size for file in files]
        self._stages = Stages(self._work, ranks, [file.name for file in files], self._sizes)
        self._hashed = settings.dedup != "off"

    def run(self) -> dict[str, Any]:
        """All stages; the report."""
        report = self._finished()
        if report is None:
            self._ranks.on_main(self._claim)
            reads = self._read()
            duplicates = self._find_duplicates(reads)
            selected, recipes = self._select(reads, duplicates)
            if self._text is not None:
                self._write_text(reads, recipes)
            tokens, recipes = self._tokenise(recipes)
            languages = self._pack(tokens, recipes)
            self._ranks.on_main(lambda: self._publish(reads, selected, tokens))
            report = self._ranks.on_main(lambda: read_json(self._out / REPORT))
            if not languages:
                raise UserError(f"no page of the input is left: {exit_line(report)}; see {self._out / REPORT}")
        else:
            get_logger().info(f"{self._out}: is finished, nothing to do")
        if not self._settings.keep_work:
            self._ranks.on_main(lambda: shutil.rmtree(self._work, ignore_errors=True))
        return report

    def _essence(self) -> dict[str, Any]:
        """The settings that decide the result, without places."""
        selection, settings = self._selection, self._settings
        return {
            "dedup": settings.dedup,
            "paragraphs": rule() if self._hashed else None,
            "langid": settings.langid,
            "langid_fingerprint": selection.identifier.fingerprint,
            "perplexity_fingerprint": selection.buckets.fingerprint,
            "languages": list(selection.languages),
            "keep_buckets": list(selection.keep_buckets),
            "min_length": selection.min_length,
            "tokenizer": self._tokenizer.fingerprint,
            "sequence_length": settings.sequence_length,
            "validation_fraction": settings.validation_fraction,
        }

    def _recipe(self, contents: Sequence[str]) -> str:
        """Of the whole result; `contents` are the sha256 of the files."""
        files = [(file.name, file.size, content) for file, content in zip(self._files, contents, strict=True)]
        return fingerprint([FORMAT, self._essence(), files])

    def _finished(self) -> dict[str, Any] | None:
        """The report of an earlier run that made exactly this, if its output is whole."""
        report = self._ranks.on_main(self._earlier_report)
        if report is None:
            return None
        contents = self._ranks.each(self._sizes, lambda unit: content_hash(self._files[unit]))
        if self._recipe(contents) != report["recipe"]:
            return None
        parts = [read_json(path) for path in sorted(self._out.glob("*/part.json"))]
        outputs = [(self._out / file["path"], file["sha256"]) for part in parts for file in part["files"]]
        if self._text is not None:
            index = read_json(self._text / TEXT_INDEX) if (self._text / TEXT_INDEX).is_file() else {}
            if index.get("recipe") != report["recipe"]:
                return None
            outputs += [(self._text / file["path"], file["sha256"]) for file in index["files"]]
        whole = self._ranks.each([1] * len(outputs), lambda unit: is_whole(*outputs[unit]))
        return report if all(whole) else None

    def _earlier_report(self) -> dict[str, Any] | None:
        if not ((self._out / MANIFEST).is_file() and (self._out / REPORT).is_file()):
            return None
        try:
            report = read_json(self._out / REPORT)
        except UserError:
            return None
        return report if isinstance(report, dict) and "recipe" in report else None

    def _claim(self) -> None:
        """Make the folders ours; until all is done there is no manifest, so that nobody trains on half of it."""
        remove_leftovers(self._out)
        for path in sorted(self._out.glob("*/part.json")):
            if read_json(path).get("recipe", {}).get("source") != SOURCE:
                raise UserError(f"--out {self._out}: holds shards of other text ({path.parent.name}); choose another")
        claim_folder(self._out, self._settings.sequence_length, self._tokenizer)
        self._tokenizer_copy = _start_saving(self._out, self._tokenizer)
        for name in (MANIFEST, REPORT, QUARANTINE):
            (self._out / name).unlink(missing_ok=True)
        for folder in (path for path in self._work.glob("*") if path.is_dir()):
            remove_leftovers(folder)

    def _read(self) -> Results:
        def recipe(file: WetFile) -> Recipe:
            return {"format": FORMAT, "file": list(file[1:]), "hashed": rule() if self._hashed else None}

        def paths(unit: int) -> tuple[Path | None, Path]:
            hashes = self._stages.path("read", unit, "hashes") if self._hashed else None
            return hashes, self._stages.path("read", unit, "quarantine")

        return self._stages.run(
            "read",
            "reading",
            [recipe(file) for file in self._files],
            lambda unit: read_file(self._files[unit], *paths(unit)),
            lambda unit, _: all(path is None or path.is_file() for path in paths(unit)),
        )

    def _find_duplicates(self, reads: Results) -> tuple[Deduplication, list[HashFile], str] | None:
        """The judged paragraphs, every file's hashes, and a fingerprint of both."""
        if not self._hashed:
            return None
        mark = fingerprint([FORMAT, self._settings.dedup, [[read["hashes"], read["paragraphs"]] for read in reads]])
        folder = self._work / f"dedup-{mark[:16]}"

        def remove_others() -> None:
            for path in self._work.glob("dedup-*"):
                if path != folder:
                    shutil.rmtree(path)

        self._ranks.on_main(remove_others)
        paths = [self._stages.path("read", unit, "hashes") for unit in range(len(reads))]
        files = hash_files(paths, [read["paragraphs"] for read in reads])
        deduplication = Deduplication(folder, files, self._settings.dedup, self._ranks)
        deduplication.run()
        return deduplication, files, mark

    def _select(
        self, reads: Results, duplicates: tuple[Deduplication, list[HashFile], str] | None
    ) -> tuple[Results, list[Recipe]]:
        essence = self._essence()
        kept = {key: essence[key] for key in ("langid_fingerprint", "perplexity_fingerprint", "languages")}
        kept |= {key: essence[key] for key in ("keep_buckets", "min_length")}
        mark = None if duplicates is None else duplicates[2]
        recipes = [{"format": FORMAT, "file": read["sha256"], "dedup": mark, **kept} for read in reads]

        def select(unit: int) -> dict[str, Any]:
            masks = None if duplicates is None else duplicates[0].masks(duplicates[1][unit])
            out = self._stages.path("select", unit, "documents")
            return select_file(self._files[unit], reads[unit]["sha256"], masks, self._selection, out)

        results = self._stages.run(
            "select",
            "selecting",
            recipes,
            select,
            lambda unit, _: self._stages.path("select", unit, "documents").is_file(),
        )
        return results, recipes

    def _write_text(self, reads: Results, selected: Sequence[Recipe]) -> None:
        """CCNet's JSON lines, and an index of them: what is not in it is not ours."""
        text = self._text
        assert text is not None, "called with --text-out only"
        self._ranks.on_main(lambda: _claim_text(text))
        results = self._stages.run(
            "text",
            "writing text",
            [
                {"documents": fingerprint(each), "folder": str(text.resolve()), "file": file.name}
                for each, file in zip(selected, self._files, strict=True)
            ],
            lambda unit: {
                "files": write_ccnet(self._stages.path("select", unit, "documents"), text, unit, self._files[unit].name)
            },
            lambda unit, result: all(is_whole(text / entry["path"], entry["sha256"]) for entry in result["files"]),
        )

        def publish() -> None:
            files = [entry for result in results for entry in result["files"]]
            names = {entry["path"] for entry in files}
            for path in text.glob("*.json.gz"):
                if path.name not in names:
                    path.unlink()  # of an earlier run: the folder was claimed
            recipe = self._recipe([read["sha256"] for read in reads])
            write_json(text / TEXT_INDEX, {"recipe": recipe, "files": files})

        self._ranks.on_main(publish)

    def _tokenise(self, selected: Sequence[Recipe]) -> tuple[Results, list[Recipe]]:
        fraction = self._settings.validation_fraction
        recipes = [
            {"documents": fingerprint(each), "tokenizer": self._tokenizer.fingerprint, "validation_fraction": fraction}
            for each in selected
        ]

        def paths(unit: int) -> tuple[Path, Path]:
            return self._stages.path("select", unit, "documents"), self._stages.path("tokenise", unit, "tokens")

        results = self._stages.run(
            "tokenise",
            "tokenising",
            recipes,
            lambda unit: tokenise_file(*paths(unit), self._tokenizer, fraction),
            lambda unit, _: paths(unit)[1].is_file(),
        )
        return results, recipes

    def _pack(self, tokens: Results, recipes: Sequence[Recipe]) -> list[str]:
        """Every language's shards; the languages."""
        languages = sorted({batch[0] for result in tokens for batch in result["batches"]})
        tokenizer = self._tokenizer
        packing = Packing(self._settings.sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        recipe = {
            "source": SOURCE,
            "validation_fraction": self._settings.validation_fraction,
            "text": fingerprint([FORMAT, *recipes]),
        }
        sources = [(self._stages.path("tokenise", unit, "tokens"), result) for unit, result in enumerate(tokens)]

        def pack(unit: int) -> None:
            if not _is_packed(self._out, languages[unit], recipe):
                pack_language(self._out, languages[unit], recipe, packing, sources)

        def remove_others() -> None:
            for path in self._out.glob("*/part.json"):
                if path.parent.name not in languages:
                    shutil.rmtree(path.parent)

        self._ranks.on_main(remove_others)
        get_logger().info(f"packing {len(languages)} languages")
        sizes = [
            sum(batch[2] for result in tokens for batch in result["batches"] if batch[0] == language)
            for language in languages
        ]
        self._ranks.each(sizes, pack)
        return languages

    def _publish(self, reads: Results, selected: Results, tokens: Results) -> None:
        try:
            self._tokenizer_copy.result()
        except BrokenProcessPool as error:
            raise UserError("copying the tokenizer: its process was killed (out of memory?); rerun") from error
        parts = [self._stages.path("read", unit, "quarantine") for unit in range(len(reads))]
        write_quarantine(self._out / QUARANTINE, parts)
        manifest = build_manifest(self._out)
        head = {
            "format": FORMAT,
            "recipe": self._recipe([read["sha256"] for read in reads]),
            "settings": self._essence(),
            "shards_fingerprint": manifest["fingerprint"],
        }
        report = build_report(head, self._files, reads, selected, tokens, manifest["languages"])
        write_json(self._out / REPORT, report)
        if manifest["languages"]:
            write_json(self._out / MANIFEST, manifest)


def _start_saving(out: Path, tokenizer: Tokenizer) -> Future[None]:
    """Save the tokenizer's copy beside the stages, in a process of its own.

    The conversion loads transformers, which would stay: 250 MB and some seconds that rank 0 alone would need.
    """
    done: Future[None] = Future()
    if (out / "tokenizer").is_dir() or "transformers" in sys.modules:
        save_tokenizer(out, tokenizer)
        done.set_result(None)
        return done
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    done = pool.submit(save_tokenizer, out, tokenizer)
    pool.shutdown(wait=False)
    return done


def _is_packed(out: Path, language: str, recipe: Recipe) -> bool:
    path = out / language / "part.json"
    if not path.is_file():
        return False
    part = read_json(path)
    return part["recipe"] == recipe and all(is_whole(out / file["path"], file["sha256"]) for file in part["files"])


def _claim_text(folder: Path) -> None:
    """Make the folder of the text ours."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / TEXT_INDEX).is_file():
        raise UserError(f"--text-out {folder}: holds other files; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not (folder / TEXT_INDEX).is_file():
        write_json(folder / TEXT_INDEX, {"recipe": None, "files": []})
