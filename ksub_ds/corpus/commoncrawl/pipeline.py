"""From Common Crawl to token shards; what preprocessing/shard_cc.py runs.

    read       every WET file: check, quarantine, hash the paragraphs             OUT/work/read
    dedup      all hashes together, exchanged between the ranks                   OUT/work/dedup-*
    select     every file again: paragraphs, language, quality, length            OUT/work/select
    tokenise   every file's documents                                             OUT/work/tokenise
    pack       every language's tokens, in the order of the files                 OUT/<lang>/
    publish    quarantine.jsonl, report.json, manifest.json; OUT/work goes        OUT/

All is a function of the input and the settings: not of the number of ranks, nor of who did what when. A
rerun does what is missing. Files are in the order of their names (a snapshot's: of its listing), pages and
paragraphs in the order of their file; that is the order in which the first copy of a paragraph is kept.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl.config import ShardCC, check
from ksub_ds.corpus.commoncrawl.dedup import Deduplication, HashFile, hash_files, rule
from ksub_ds.corpus.commoncrawl.documents import write_ccnet
from ksub_ds.corpus.commoncrawl.estimate import estimate
from ksub_ds.corpus.commoncrawl.filter import Selection, read_file, select_file
from ksub_ds.corpus.commoncrawl.inputs import WetFile, describe, fetch_snapshot, find_wet_files
from ksub_ds.corpus.commoncrawl.langid import load_identifier
from ksub_ds.corpus.commoncrawl.output import FORMAT, REPORT, SOURCE, TEXT_INDEX, CrawlFolder, Results, exit_line
from ksub_ds.corpus.commoncrawl.perplexity import load_buckets
from ksub_ds.corpus.commoncrawl.stages import Recipe, Stages, fingerprint
from ksub_ds.corpus.commoncrawl.tokenize import pack_language, tokenise_file
from ksub_ds.corpus.shards.folder import is_whole, locked, make_folder, parts, remove_leftovers
from ksub_ds.corpus.shards.packing import Packing
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer

# Merged docstring, to be folded in:
# """One run over Common Crawl: the stages in their order, and what each of them depends on."""


class CrawlRun:
    """Every method is called on all ranks, in the same order."""

    def __init__(
        self, settings: ShardCC, ranks: MPIComm, files: list[WetFile], tokenizer: Tokenizer, selection: Selection
    ):
        self._folder = CrawlFolder(settings, ranks, files, tokenizer, selection)
        self._settings, self._ranks, self._files = settings, ranks, files
        self._tokenizer, self._selection = tokenizer, selection
        self._out, self._work, self._text = settings.out, settings.out / "work", settings.text_out
        self._sizes = [file.size for file in files]
        self._stages = Stages(self._work, ranks, [file.name for file in files], self._sizes)
        self._hashed = settings.dedup != "off"

    def run(self) -> dict[str, Any]:
        """All stages; the report."""
        report = self._folder.finished()
        if report is None:
            self._ranks.on_main(self._folder.claim)
            reads = self._read()
            duplicates = self._find_duplicates(reads)
            selected, recipes = self._select(reads, duplicates)
            if self._text is not None:
                self._write_text(reads, recipes)
            tokens, recipes = self._tokenise(recipes)
            languages = self._pack(tokens, recipes)
            quarantine = [self._stages.path("read", unit, "quarantine") for unit in range(len(reads))]
            report = self._ranks.on_main(lambda: self._folder.publish(quarantine, reads, selected, tokens))
            if not languages:
                raise UserError(f"no page of the input is left: {exit_line(report)}; see {self._out / REPORT}")
        else:
            get_logger().info(f"{self._out}: is finished, nothing to do")
        if not self._settings.keep_work:
            self._ranks.on_main(lambda: shutil.rmtree(self._work, ignore_errors=True))
        return report

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
        essence = self._folder.essence
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
            recipe = self._folder.recipe([read["sha256"] for read in reads])
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
            for path in parts(self._out):
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


def shard_cc(settings: ShardCC, ranks: MPIComm) -> dict[str, Any]:
    """Run all stages; called on every rank. Returns the report.

    Raises:
        UserError: a setting out of range, no input, no room, or shards made with other settings in the way.
    """
    if not ranks.is_main:
        get_logger().setLevel("WARNING")
    check(settings)
    files = ranks.on_main(lambda: find_files(settings, settings.segments))
    tokenizer = ranks.agree(lambda: load_tokenizer(settings.tokenizer))
    selection = ranks.agree(lambda: load_selection(settings))
    ranks.on_main(lambda: make_folder(settings.out))
    lock = locked(settings.out) if ranks.is_main else nullcontext()
    ranks.agree(lock.__enter__)
    try:
        return CrawlRun(settings, ranks, files, tokenizer, selection).run()
    finally:
        lock.__exit__(None, None, None)


def dry_run(settings: ShardCC, ranks: MPIComm) -> str:
    """An estimate of time and disk for this many ranks, made by rank 0; empty on the others.

    Of a snapshot one file is fetched and stands for all.
    """

    def on_rank_0() -> str:
        first, _, end = settings.segments.partition(":")
        files = find_files(settings, f"{first}:{int(first) + 1}" if first.isdigit() and end.isdigit() else "")
        total = sum(file.size for file in files) * (1 if settings.snapshot is None else int(end) - int(first))
        selection, tokenizer = load_selection(settings), load_tokenizer(settings.tokenizer)
        return estimate(
            files, total, selection, tokenizer, settings.dedup, ranks.size, settings.text_out is not None, settings.out
        )

    check(settings)
    return ranks.on_main(on_rank_0)


def find_files(settings: ShardCC, segments: str) -> list[WetFile]:
    """The input's files in their order; of a snapshot those of `segments`, fetched first."""
    if settings.snapshot is None:
        return find_wet_files(settings.input)
    paths = fetch_snapshot(settings.snapshot, segments, settings.base_url, settings.cache, settings.connections)
    return [describe(path, path.relative_to(settings.cache).as_posix()) for path in paths]


def load_selection(settings: ShardCC) -> Selection:
    """What decides which pages stay."""
    identifier = load_identifier(settings.langid, settings.langid_model, settings.langid_threshold)
    buckets = load_buckets(settings.lm_models)
    languages = tuple(sorted(set(settings.languages)))
    return Selection(identifier, buckets, languages, tuple(sorted(set(settings.keep_buckets))), settings.min_length)
