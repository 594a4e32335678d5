"""From Common Crawl to token shards; what preprocessing/shard_cc.py runs.

    stage       reads                                     writes
    read        a WET file                                OUT/work/read/N.hashes, N.quarantine
    dedup       all hashes, exchanged between the ranks   OUT/work/dedup-*/judged
    select      a WET file, its paragraphs' answers       OUT/work/select/N.documents
    text        a file's documents                        TEXT_OUT/<lang>_<bucket>_N.json.gz
    tokenise    a file's documents                        OUT/work/tokenise/N.tokens
    pack        all tokens of a language                  OUT/<lang>/*.arrow, part.json
    publish     quarantine, results of all stages         OUT/quarantine.jsonl, report.json, manifest.json

read, select, text and tokenise go file by file (stages.py), pack goes language by language. Every WET file is read
twice, which costs less than storing what was read.

The output is a function of the input and the settings, not of the number of ranks or of which rank did what. Files
are in the order of their names (a snapshot's: of its listing), pages and paragraphs in the order of their file; that
is the order in which the first copy of a paragraph is kept. A rerun does only what is missing.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl.config import ShardCC, check
from ksub_ds.corpus.commoncrawl.dedup import Deduplication, hash_files, rule
from ksub_ds.corpus.commoncrawl.documents import write_ccnet
from ksub_ds.corpus.commoncrawl.estimate import estimate
from ksub_ds.corpus.commoncrawl.inputs import WetFile, describe, fetch_snapshot, find_wet_files
from ksub_ds.corpus.commoncrawl.langid import load_identifier
from ksub_ds.corpus.commoncrawl.output import SOURCE, CrawlFolder, has_files
from ksub_ds.corpus.commoncrawl.page_selection import Selection, read_file, select_file
from ksub_ds.corpus.commoncrawl.perplexity import load_buckets
from ksub_ds.corpus.commoncrawl.report import FORMAT, QUARANTINE, REPORT, exit_line, left_out, summary
from ksub_ds.corpus.commoncrawl.stages import Result, Stage, StageKey, StageRunner, fingerprint
from ksub_ds.corpus.commoncrawl.tokenize import is_packed, pack_language, tokenise_file
from ksub_ds.corpus.shards.folder import locked, make_folder, parts
from ksub_ds.corpus.shards.packing import Packing
from ksub_ds.corpus.text.skipped import LeftOut, Skipped
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer

WORK = re.compile(r"read|select|text|tokenise|dedup-.+|\..+")  # what the stages make in OUT/work


class CrawlRun:
    """One run: its stages, and what the result of each depends on. All ranks call the same methods in the same order.

    Args:
        settings: checked settings.
        comm: the ranks.
        files: the WET files, in order.
        tokenizer: the opened tokenizer.
        selection: what decides which pages stay.
    """

    def __init__(
        self, settings: ShardCC, comm: MPIComm, files: list[WetFile], tokenizer: Tokenizer, selection: Selection
    ):
        self._folder = CrawlFolder(settings, comm, files, tokenizer, selection)
        self._settings, self._comm, self._files = settings, comm, files
        self._tokenizer, self._selection = tokenizer, selection
        self._out, self._work = settings.out, settings.out / "work"
        self._stages = StageRunner(self._work, comm, [file.name for file in files], [file.size for file in files])

    def run(self) -> dict[str, Any]:
        """Run all stages, unless the output is already there, and return the report.

        Raises:
            UserError: on every rank, when a stage failed on any, when no page is left, or when --strict refuses what
                is left.
        """
        report = self._folder.finished()
        if report is None:
            report = self._make()
        else:
            get_logger().info(f"{self._out}: is finished, nothing to do")
        if self._settings.strict and (missing := left_out(report, self._settings.languages)):
            raise UserError(f"--strict: {summary(missing)}; fix the input, or run again without --strict")
        if not self._settings.keep_work:
            self._comm.on_main(self._remove_work)
        return report

    def _remove_work(self) -> None:
        """Remove the results of the stages, and their folder if nothing else lies there."""
        for path in self._work.glob("*"):
            if WORK.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # something else, or nothing
            self._work.rmdir()

    def _make(self) -> dict[str, Any]:
        self._comm.on_main(self._folder.claim)
        read = self._read_stage()
        reads = self._run(read)
        duplicates = self._deduplicate(read, reads)
        select = self._select_stage(reads, duplicates)
        selected = self._run(select)
        if self._settings.text_out is not None:
            self._comm.on_main(self._folder.claim_text)
            texts = self._run(self._text_stage(select, self._settings.text_out))
            self._comm.on_main(lambda: self._folder.publish_text(reads, texts))
        tokenise = self._tokenise_stage(select)
        tokens = self._run(tokenise)
        languages = self._pack(tokenise, tokens)
        report = self._comm.on_main(lambda: self._folder.publish(read.outputs["quarantine"], reads, selected, tokens))
        if not languages:
            reasons = [summary(lines)] if (lines := left_out(report, ())) else []
            see = QUARANTINE if report["quarantined"] else REPORT
            line = "; ".join([*reasons, exit_line(report)])
            raise UserError(f"no page of the input is left: {line}; see {self._out / see}")
        return report

    def _run(self, stage: Stage) -> list[Result]:
        return self._stages.run(stage)

    def _read_stage(self) -> Stage:
        """Check every page of a WET file, hash its paragraphs, list its faults."""
        hashed = self._settings.dedup != "off"
        outputs = {"quarantine": self._stages.files("read", "quarantine")}
        if hashed:
            outputs["hashes"] = self._stages.files("read", "hashes")
        return Stage(
            "read",
            "reading",
            inputs={"file": self._files},
            outputs=outputs,
            keys=[
                {"format": FORMAT, "file": list(file[1:]), "hashed": rule() if hashed else None} for file in self._files
            ],
            run=read_file,
        )

    def _deduplicate(self, read: Stage, reads: Sequence[Result]) -> tuple[Deduplication, str] | None:
        """Decide over all hashes which paragraphs stay; return the decisions and their fingerprint."""
        if "hashes" not in read.outputs:
            return None
        mode = self._settings.dedup
        key = fingerprint([FORMAT, mode, [[result["hashes"], result["paragraphs"]] for result in reads]])
        folder = self._work / f"dedup-{key[:16]}"

        def remove_others() -> None:
            for path in self._work.glob("dedup-*"):
                if path != folder:
                    shutil.rmtree(path)

        self._comm.on_main(remove_others)
        files = hash_files(read.outputs["hashes"], [result["paragraphs"] for result in reads])
        deduplication = Deduplication(folder, files, mode, self._comm)
        deduplication.run()
        return deduplication, key

    def _select_stage(self, reads: Sequence[Result], duplicates: tuple[Deduplication, str] | None) -> Stage:
        """Read a WET file again and keep paragraphs, then pages by language, perplexity and length."""
        deduplication, dedup_key = duplicates or (None, None)
        names = ("langid_fingerprint", "perplexity_fingerprint", "languages", "keep_buckets", "min_length")
        key: StageKey = {name: self._folder.fingerprint_inputs[name] for name in names}
        return Stage(
            "select",
            "selecting",
            inputs={
                "file": self._files,
                "sha256": [result["sha256"] for result in reads],
                "hashes": deduplication.files if deduplication else [None] * len(self._files),
            },
            outputs={"documents": self._stages.files("select", "documents")},
            keys=[{"format": FORMAT, "file": result["sha256"], "dedup": dedup_key, **key} for result in reads],
            run=partial(select_file, deduplication=deduplication, selection=self._selection),
        )

    def _text_stage(self, select: Stage, folder: Path) -> Stage:
        """Write a file's documents as CCNet's JSON lines."""
        names = [file.name for file in self._files]
        return Stage(
            "text",
            "writing text",
            inputs={"documents": select.outputs["documents"], "unit": range(len(names)), "segment": names},
            outputs={},  # one file for each language and bucket that a unit has: named in its result
            keys=[
                {"documents": fingerprint(key), "folder": str(folder.resolve()), "file": name}
                for key, name in zip(select.keys, names, strict=True)
            ],
            run=partial(write_ccnet, folder=folder),
            check=lambda result: has_files(folder, result["files"]),
        )

    def _tokenise_stage(self, select: Stage) -> Stage:
        """Tokenise a file's documents, by language and split."""
        tokenizer, fraction = self._tokenizer, self._settings.validation_fraction
        key: StageKey = {"tokenizer": tokenizer.fingerprint, "validation_fraction": fraction}
        return Stage(
            "tokenise",
            "tokenising",
            inputs={"documents": select.outputs["documents"]},
            outputs={"tokens": self._stages.files("tokenise", "tokens")},
            keys=[{"documents": fingerprint(each), **key} for each in select.keys],
            run=partial(tokenise_file, tokenizer=tokenizer, validation_fraction=fraction),
        )

    def _pack(self, tokenise: Stage, tokens: Sequence[Result]) -> list[str]:
        """Pack every language's tokens to shards; return the languages."""
        languages = sorted({batch[0] for result in tokens for batch in result["batches"]})
        tokenizer = self._tokenizer
        packing = Packing(self._settings.sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        key: StageKey = {
            "source": SOURCE,
            "validation_fraction": self._settings.validation_fraction,
            "text": fingerprint([FORMAT, *tokenise.keys]),
        }
        sources = list(zip(tokenise.outputs["tokens"], tokens, strict=True))

        def pack(unit: int) -> None:
            if not is_packed(self._out, languages[unit], key):
                pack_language(self._out, languages[unit], key, packing, sources)

        def remove_others() -> None:
            for path in parts(self._out):
                if path.parent.name not in languages:
                    get_logger().info(f"{path.parent}: shards of an earlier request, removed: no page of this one")
                    if path.parent.is_symlink():  # to another disk
                        path.parent.unlink()
                    else:
                        shutil.rmtree(path.parent)  # an error ends the run: the manifest would name them

        self._comm.on_main(remove_others)
        get_logger().info(f"packing {len(languages)} languages")
        sizes = [
            sum(batch[2] for result in tokens for batch in result["batches"] if batch[0] == language)
            for language in languages
        ]
        self._comm.each(sizes, pack)
        return languages


def shard_cc(settings: ShardCC, comm: MPIComm) -> dict[str, Any]:
    """Run all stages on every rank and return the report.

    Args:
        settings: of the command line.
        comm: the ranks.

    Returns:
        What report.json holds, and as "left_out" a line on the files of the input that are not read, if there are any.

    Raises:
        UserError: a setting out of range, no input, no room, or shards made with other settings in the way.
    """
    if not comm.is_main:
        get_logger().setLevel("WARNING")
    check(settings)
    files, besides = comm.on_main(lambda: find_files(settings, settings.segments))
    tokenizer = comm.agree(lambda: load_tokenizer(settings.tokenizer, settings.nfc))
    selection = comm.agree(lambda: load_selection(settings))
    comm.on_main(lambda: make_folder(settings.out))
    lock = locked(settings.out) if comm.is_main else nullcontext()
    comm.agree(lock.__enter__)
    try:
        report = CrawlRun(settings, comm, files, tokenizer, selection).run()
        return report | {"left_out": besides} if besides else report
    finally:
        lock.__exit__(None, None, None)


def dry_run(settings: ShardCC, comm: MPIComm) -> str:
    """Return an estimate of time and disk for this many ranks, made by rank 0 from a sample of the input.

    Of a snapshot one file is fetched, as a sample of all.
    """

    def on_rank_0() -> str:
        first, _, end = settings.segments.partition(":")
        files, _ = find_files(settings, f"{first}:{int(first) + 1}" if first.isdigit() and end.isdigit() else "")
        total = sum(file.size for file in files) * (1 if settings.snapshot is None else int(end) - int(first))
        selection, tokenizer = load_selection(settings), load_tokenizer(settings.tokenizer, settings.nfc)
        return estimate(
            files, total, selection, tokenizer, settings.dedup, comm.size, settings.text_out is not None, settings.out
        )

    check(settings)
    return comm.on_main(on_rank_0)


def find_files(settings: ShardCC, segments: str) -> tuple[list[WetFile], list[str]]:
    """Return the input's files in their order, and lines on what is lost of it; of a snapshot fetch `segments` first.

    Raises:
        UserError: there is no file, or --strict refuses what is lost.
    """
    if settings.snapshot is None:
        skipped = Skipped()
        files = find_wet_files(settings.input, skipped)
        lost = LeftOut({}, skipped)
        if settings.strict:
            lost.refuse("nothing was read")
        return files, lost.lines
    paths = fetch_snapshot(settings.snapshot, segments, settings.base_url, settings.cache, settings.connections)
    return [describe(path, path.relative_to(settings.cache).as_posix()) for path in paths], []


def load_selection(settings: ShardCC) -> Selection:
    """Load the models that decide which pages stay.

    Args:
        settings: of the command.

    Raises:
        UserError: an option or a model cannot be used, or a package is missing.
    """
    identifier = load_identifier(settings.langid, settings.langid_model, settings.langid_threshold)
    buckets = load_buckets(settings.lm_models)
    languages = tuple(sorted(set(settings.languages)))
    return Selection(identifier, buckets, languages, tuple(sorted(set(settings.keep_buckets))), settings.min_length)
