"""From a folder of text to a folder of token shards; what preprocessing/shard_text.py runs.

For each language: find its text (sources.py), read documents (reader.py), tokenise, split off the held-out part, pack,
write `SHARDS/<lang>/` under a temporary name, rename it; then the same for each pair of languages (pairs.py), to
`SHARDS/<l1>+<l2>/`. The manifest is written last. A run that is killed leaves only
whole languages, and the same command again makes the missing ones. The result depends on text, tokenizer and
settings, not on the number of processes.
"""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import tyro

from ksub_ds.common.errors import UserError, describe_os_error
from ksub_ds.common.files import atomic_folder, read_json, write_json
from ksub_ds.common.languages import LANGUAGE_PAIR, language_name, standard_code
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.common.option_help import Section
from ksub_ds.corpus.shards.dataset import MANIFEST, SPLITS, read_manifest
from ksub_ds.corpus.shards.folder import (
    build_manifest,
    check_replaced,
    claim_folder,
    has_rows,
    is_whole,
    locked,
    make_folder,
    parts,
    remove_leftovers,
    save_tokenizer,
)
from ksub_ds.corpus.shards.packing import Packer, Packing, PairPacker, frame_pair
from ksub_ds.corpus.shards.writer import LanguageWriter, check_shard_settings, split_of
from ksub_ds.corpus.text.hub import DatasetSource
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.pairs import Pair, PairReader, find_pairs
from ksub_ds.corpus.text.reader import DocumentReader, SourceReader
from ksub_ds.corpus.text.skipped import TOO_LONG_PAIRS, LeftOut, Skipped
from ksub_ds.corpus.text.sources import LanguageText, find_text
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.corpus.tokenizers.parallel import ParallelEncoder

Item = TypeVar("Item")

BATCH_CHARACTERS = 1 << 20  # of text per batch: a second or less of tokenising


@dataclass
class ShardText:
    """Turn a folder of text into token shards for pretraining. The same command again makes what is missing."""

    input: Path | None = None
    """Folder of <lang>.jsonl, .json, .txt (blank lines separate documents), .parquet, .arrow, or of folders <lang>/."""
    tokenizer: Path = tyro.MISSING
    """A SentencePiece .model in XLM-R's layout, the folder of a HuggingFace tokenizer, or a name in the hub's cache."""
    out: Path = tyro.MISSING
    """Folder to write the shards to."""
    sequence_length: Annotated[int, Section("output")] = 512
    """Tokens per row, <s> and </s> included."""
    validation_fraction: float = 0.01
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenise. [one per core]"""
    nfc: bool = False
    """Put text in Unicode's form NFC before tokenising; the tokenizer saved with the shards does so too."""
    languages: Annotated[tuple[str, ...], Section("input")] = ()
    """Only these languages of --input. [all that are there]"""
    splits: tuple[Literal["train", "validation", "test"], ...] = ()
    """Take files of these splits, by names such as en.test.jsonl; other names say train. [train; names the others]"""
    text_column: str | None = None
    """Key or column that holds the text, of JSON, tables and --datasets. ["text", else "raw_content"]"""
    line_documents: bool = False
    """Each line of a .txt is a document. [blank lines separate documents]"""
    parallel: Path | None = None
    """Folder of translations, <l1>-<l2>.jsonl or .parquet with {"translation": {"en": ..., "sw": ...}} or
    {"en": ..., "sw": ...}, or of folders <l1>-<l2>/. Without --input and --datasets, pairs are added to the languages
    in --out."""
    datasets: tuple[str, ...] = ()
    """Streamed from the hub: wikipedia, bookcorpus, NAME or NAME:CONFIG (column "text"); NAME may be a local folder."""
    datasets_language: str = "en"
    """Language of --datasets, and edition of wikipedia."""
    strict: bool = False
    """Fail where a language or a file of --input is left out or cannot be read to its end."""

    def layout(self) -> TextLayout:
        """Return how documents lie in the files."""
        return TextLayout(self.text_column, self.line_documents)


def shard_text(settings: ShardText) -> dict[str, Any]:
    """Shard the text and return the manifest.

    Raises:
        UserError: a setting out of range, no text, shards made with other settings in the way, or a disk that refuses
            a file.
    """
    try:
        return _shard_text(settings)
    except OSError as error:
        raise UserError(describe_os_error(error)) from error


def _shard_text(settings: ShardText) -> dict[str, Any]:
    _check(settings)
    text, others = _text_of(settings)
    pair_of: dict[str, Pair] = {}
    if settings.parallel:
        pairs = find_pairs(settings.parallel, settings.splits, others)
        pair_of = {"+".join(pair): pair for pair in pairs}
        text |= {"+".join(pair): entry for pair, entry in pairs.items()}
    left_out = LeftOut({language: entry.skipped for language, entry in text.items()}, others)
    if settings.strict:
        left_out.refuse("nothing was read")
    tokenizer = load_tokenizer(settings.tokenizer, settings.nfc)
    if pair_of and tokenizer.mask_id is None:
        raise UserError(
            f"--parallel {settings.parallel}: pairs are for masked models, and {settings.tokenizer} has no mask token; "
            "leave the option out, or give a tokenizer that has one"
        )
    make_folder(settings.out)
    with locked(settings.out):
        check_replaced(settings.out, text, ("tokenizer", MANIFEST), _local_sources(settings))
        remove_leftovers(settings.out)
        claim_folder(settings.out, settings.sequence_length, tokenizer)
        save_tokenizer(settings.out, tokenizer)
        kept = _kept_languages(settings)
        recipes = {language: _recipe_of(settings, sources) for language, sources in text.items()}
        todo = {name: recipe for name, recipe in recipes.items() if not _is_done(settings.out, name, recipe)}
        if todo:  # there is no manifest until all is done, so that nobody trains on half of the data
            _withdraw_manifest(settings.out, kept)
            _make(settings, tokenizer, {name: (text[name], recipe) for name, recipe in todo.items()}, pair_of)
        manifest = build_manifest(settings.out, {*text, *kept})
        made = {name: read_json(settings.out / name / "part.json") for name in text}
        if not any(entry["files"] for entry in made.values()):
            given = settings.input or " ".join(settings.datasets) or settings.parallel
            left_out.report()
            what = "pair" if pair_of.keys() == text.keys() else "document in any language"
            raise UserError(f"{given}: no readable {what}, see the counts above{left_out.first_example()}")
        left_out.add_unread(made)
        if settings.strict and left_out.lines:
            _withdraw_manifest(settings.out, kept)
            left_out.refuse(f"the shards stay, but {settings.out} gets no manifest")
        write_json(settings.out / MANIFEST, manifest)
        besides = [path.parent.name for path in parts(settings.out) if path.parent.name not in {*text, *kept}]
    left_out.report()
    _report(manifest, sorted(todo), settings.out, besides)
    return manifest


def _make(
    settings: ShardText,
    tokenizer: Tokenizer,
    todo: dict[str, tuple[LanguageText, dict[str, Any]]],
    pair_of: dict[str, Pair],
) -> None:
    """Make the shards of some languages, and of pairs of languages.

    Args:
        settings: of the run.
        tokenizer: the tokenizer.
        todo: name in shards -> its text and what decides its shards.
        pair_of: the pair of each name that is one.
    """
    total = sum(text.size() for text, _ in todo.values())
    packing = Packing(settings.sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    with (
        Progress(total // 1000 or None, "kB of text", "sharding") as progress,
        ParallelEncoder(tokenizer, settings.workers) as encoder,
    ):
        for name, (text, recipe) in todo.items():
            making = Making(settings.out, name, text, recipe, packing, encoder, progress)
            if name in pair_of:
                shard_pair(making, pair_of[name])
            else:
                shard_language(making, settings.layout())


def _check(settings: ShardText) -> None:
    check_shard_settings(settings.sequence_length, settings.validation_fraction)
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: must be at least 1")
    for option, languages in (("languages", settings.languages), ("datasets-language", (settings.datasets_language,))):
        for language in languages:
            if language_name(language) is None:
                raise UserError(f"--{option} {language}: is not a language code such as en or zh-Hant")
    for name in settings.datasets:
        if settings.datasets.count(name) > 1:
            raise UserError(f"--datasets {name}: is given twice")
    if not (settings.input or settings.datasets or settings.parallel):
        raise UserError("--input FOLDER, --datasets NAME... or --parallel FOLDER: one of them is needed")
    for folder in (settings.input, settings.parallel):
        if folder is not None and settings.out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {settings.out}: lies in the input folder; write the shards somewhere else")


def _local_sources(settings: ShardText) -> list[Path]:
    """Return the files and folders of this machine that are read."""
    given = (settings.input, settings.parallel, *(Path(name.partition(":")[0]) for name in settings.datasets))
    return [path for path in given if path is not None and path.exists()]


def _kept_languages(settings: ShardText) -> set[str]:
    """Return the languages in --out that --parallel by itself adds pairs to.

    Raises:
        UserError: a run that makes them has not finished.
    """
    made = [path for path in parts(settings.out) if has_rows(path)]
    there = {path.parent.name for path in made if not LANGUAGE_PAIR.fullmatch(path.parent.name)}
    if not there or settings.input is not None or settings.datasets:
        return set()
    if not (settings.out / MANIFEST).is_file():
        raise UserError(
            f"--out {settings.out}: holds {', '.join(sorted(there))} but no {MANIFEST}; let the run that makes them "
            "finish, or give its --input beside --parallel"
        )
    return set(read_manifest(settings.out)["languages"])


def _withdraw_manifest(out: Path, kept: set[str]) -> None:
    """Remove the manifest, or all from it but languages that stay as they are."""
    if kept:
        write_json(out / MANIFEST, build_manifest(out, kept))
    else:
        (out / MANIFEST).unlink(missing_ok=True)


def _text_of(settings: ShardText) -> tuple[dict[str, LanguageText], Skipped]:
    """Return the text of each language, and what lies in the folder besides."""
    others = Skipped()
    text: dict[str, LanguageText] = {}
    if settings.input:
        text = find_text(settings.input, settings.languages, splits=settings.splits, others=others)
    if settings.datasets:
        code = standard_code(settings.datasets_language)
        own = language_name(settings.datasets_language) or code
        language = next((name for name in text if standard_code(name) == code), own)
        entry = text.setdefault(language, LanguageText([], Skipped()))
        for name in settings.datasets:
            entry.sources.append(DatasetSource(name, settings.datasets_language, settings.layout(), entry.skipped))
    return text, others


def _recipe_of(settings: ShardText, text: LanguageText) -> dict[str, Any]:
    """Return what, besides settings.json, decides a language's shards."""
    return {
        "validation_fraction": settings.validation_fraction,
        "text": text.fingerprint(),
        **settings.layout().recipe(),
    }


def _is_done(folder: Path, language: str, recipe: dict[str, Any]) -> bool:
    """Return whether a language's shards are there, whole, and made from this text."""
    path = folder / language / "part.json"
    if not path.is_file():
        return False
    try:
        part = read_json(path)
        if part["recipe"] != recipe:
            get_logger().info(f"{language}: text, --validation-fraction or the way it is read changed, doing it again")
            return False
        damaged = [f["path"] for f in part["files"] if not is_whole(folder / f["path"], f["sha256"])]
    except (UserError, KeyError, TypeError):
        damaged = [f"{language}/part.json"]
    if damaged:
        get_logger().info(f"{damaged[0]}: missing or damaged, doing {language} again")
    return not damaged


def _report(manifest: dict[str, Any], done: list[str], out: Path, besides: list[str]) -> None:
    log = get_logger()
    made = manifest["languages"] | manifest.get("pairs", {})
    if besides:
        folders = " ".join(shlex.quote(str(out / language)) for language in besides)
        log.info(
            f"warning: {out} holds {', '.join(besides)} from an earlier run, of which --input, --languages and "
            f"--parallel say nothing: not in the manifest, not trained on; to remove: rm -r {folders}"
        )
    bare = [language for language, entry in made.items() if entry["files"] and not entry["validation"]["sequences"]]
    if bare:
        log.info(
            f"warning: no held-out rows in {', '.join(bare)}: too few documents for --validation-fraction; "
            "no evaluation there"
        )
    sequences = sum(entry["train"]["sequences"] for entry in made.values())
    tokens = sum(entry[split]["tokens"] for entry in made.values() for split in SPLITS)
    counts = [_count(len(manifest["languages"]), "language")]
    if "pairs" in manifest:
        counts.append(_count(len(manifest["pairs"]), "pair") + " of languages")
    log.info(
        f"{' and '.join(counts)} ({len(done)} made now), {sequences:,} training sequences, "
        f"{tokens:,} tokens, fingerprint {manifest['fingerprint'][:16]}"
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


@dataclass(frozen=True)
class Making:
    """Making the shards of one language, or of one pair of languages.

    Attributes:
        out: the shards folder.
        name: the language's code, or the pair's name in shards.
        text: its sources; their `skipped` counts are updated.
        recipe: what decides the result, kept in part.json; "validation_fraction" is read from it.
        packing: the form of a row.
        encoder: the processes that tokenise.
        progress: in kB of text on the disk.
    """

    out: Path
    name: str
    text: LanguageText
    recipe: dict[str, Any]
    packing: Packing
    encoder: ParallelEncoder
    progress: Progress

    def split_of(self, text: str) -> str:
        """Return the split of a document by its text."""
        return split_of(text.encode(), self.recipe["validation_fraction"])


class EncodedText(NamedTuple):
    """The ids of a document, or of a framed pair; its split; the bytes of its text."""

    ids: np.ndarray
    split: str
    size: int


def shard_language(making: Making, layout: TextLayout) -> None:
    """Read, tokenise, pack and write one language; publish `out`/<lang>/ when it is whole.

    Args:
        making: what is made.
        layout: how documents lie in the files.
    """
    reader = DocumentReader(making.text.sources, making.text.skipped, layout)

    def encoded() -> Iterator[list[EncodedText]]:
        for texts, ids in making.encoder.encode(_batches(reader, len)):
            documents = []
            for document, tokens in zip(texts, ids, strict=True):
                if len(tokens):
                    documents.append(EncodedText(tokens, making.split_of(document), len(document.encode())))
                else:
                    making.text.skipped.add("no_token")
            yield documents

    _publish(making, reader, encoded(), Packer)


def shard_pair(making: Making, pair: Pair) -> None:
    """Read, tokenise, pack and write the pairs of two languages; publish `out`/<l1>+<l2>/ when it is whole.

    A pair longer than a row is left out and counted, as XLM leaves out what is longer than its --max_len. English, or
    else the first side, decides the split, so that an English sentence is held out in all its translations.

    Args:
        making: what is made.
        pair: the languages.
    """
    reader = PairReader(making.text, pair)
    longest, skipped = making.packing.sequence_length, making.text.skipped
    decides = pair.index("en") if "en" in pair else 0

    def encoded() -> Iterator[list[EncodedText]]:
        batches = _batches(reader, lambda sides: sum(map(len, sides)))
        for texts, ids in making.encoder.encode([side for sides in batch for side in sides] for batch in batches):
            pairs = []
            for sides, tokens in zip(_by_two(texts), _by_two(ids), strict=True):
                framed = frame_pair(*tokens, making.packing)
                if not all(map(len, tokens)):
                    skipped.add("no_token")
                elif len(framed) > longest:
                    skipped.add(TOO_LONG_PAIRS, f"{len(framed):,} tokens, more than a row's {longest}")
                else:
                    size = sum(len(side.encode()) for side in sides)
                    pairs.append(EncodedText(framed, making.split_of(sides[decides]), size))
            yield pairs

    _publish(making, reader, encoded(), PairPacker)


def _by_two(items: list[Item]) -> Iterator[tuple[Item, Item]]:
    return zip(items[::2], items[1::2], strict=True)


def _publish(
    making: Making,
    reader: SourceReader[Any],
    encoded: Iterator[list[EncodedText]],
    packer: type[Packer] | type[PairPacker],
) -> None:
    """Pack and write what is encoded, and give the folder its name when it is whole."""
    name, text, progress = making.name, making.text, making.progress
    shown = 0
    with atomic_folder(making.out / name) as folder:
        writer = LanguageWriter(folder, name, making.packing, packer)
        for batch in encoded:
            for split in SPLITS:
                own = [document for document in batch if document.split == split]
                writer.add(split, [document.ids for document in own], sum(document.size for document in own))
            done = reader.bytes_read // 1000
            progress.advance(done - shown, language=name, tokens=f"{writer.counts['train']['tokens']:,}")
            shown = done
        part = writer.finish()
        skipped = dict(sorted(text.skipped.counts.items()))
        files = part.pop("files")
        write_json(folder / "part.json", {"recipe": making.recipe, **part, "skipped": skipped, "files": files})
    progress.advance(max(text.size() // 1000 - shown, 0), language=name)
    if skipped:
        get_logger().info(f"{name}: skipped documents or files: {', '.join(text.skipped.lines())}")


def _batches(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
