"""From a folder of text to a folder of token shards; what preprocessing/shard_text.py runs.

Language by language: read, tokenise, split off the held-out part, pack, write `SHARDS/<lang>/` under
a temporary name, rename. Last comes the manifest. A run that is killed leaves only whole languages,
and the same command again does the missing ones. The result depends on text, tokenizer and settings
alone: not on the number of processes, nor on the day.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json, sha256_file, write_json
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.encoding import ParallelEncoder
from ksub_ds.corpus.language_shards import shard_language
from ksub_ds.corpus.packing import Packing
from ksub_ds.corpus.shards import FORMAT_VERSION, LANGUAGE_CODE, MANIFEST, SPLITS, dataset_fingerprint
from ksub_ds.corpus.text import LanguageText, find_text
from ksub_ds.corpus.tokenizer import Tokenizer, load_tokenizer

SHORTEST_SEQUENCE, LONGEST_SEQUENCE = 8, 1 << 16


@dataclass
class ShardText:
    """Turn a folder of text into token shards for pretraining. The same command again does what is missing."""

    input: Path
    """Folder of <lang>.jsonl[.gz], <lang>.txt[.gz] (blank lines part documents) or <lang>/ with such files."""
    tokenizer: Path
    """A SentencePiece .model in XLM-R's layout, or the folder of a HuggingFace tokenizer."""
    out: Path
    """Folder to write the shards to."""
    sequence_length: int = 512
    """Tokens a row, <s> and </s> included."""
    validation_fraction: float = 0.01
    """Share of the documents held out for evaluation, chosen by a hash of their text."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that tokenise. [one per core]"""
    languages: tuple[str, ...] = ()
    """Only these languages. [all that are there]"""


def shard_text(settings: ShardText) -> dict[str, Any]:
    """Shard the text and return the manifest.

    Raises:
        UserError: a setting out of range, no text, or shards made with other settings in the way.
    """
    _check(settings)
    text = find_text(settings.input, settings.languages)
    tokenizer = load_tokenizer(settings.tokenizer)
    _make_folder(settings.out)
    with _lock(settings.out):
        _remove_leftovers(settings.out)
        _claim_folder(settings, tokenizer)
        todo = {}
        for language, sources in text.items():
            recipe = _recipe_of(settings, sources)
            if not _is_done(settings.out, language, recipe):
                todo[language] = recipe
        if todo:  # until all is done there is no manifest, so nobody trains on half of it
            (settings.out / MANIFEST).unlink(missing_ok=True)
            total = sum(text[language].size() for language in todo)
            packing = Packing(settings.sequence_length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
            with (
                Progress(total // 1000, "kB of text", "sharding") as progress,
                ParallelEncoder(tokenizer, settings.workers) as encoder,
            ):
                for language, recipe in todo.items():
                    shard_language(settings.out, language, text[language], recipe, packing, encoder, progress)
        manifest = _build_manifest(settings.out)
        if not any(entry["files"] for entry in manifest["languages"].values()):
            raise UserError(f"--input {settings.input}: no readable document in any language (see the counts above)")
        write_json(settings.out / MANIFEST, manifest)
    _report(manifest, sorted(todo))
    return manifest


def _check(settings: ShardText) -> None:
    if not SHORTEST_SEQUENCE <= settings.sequence_length <= LONGEST_SEQUENCE:
        raise UserError(
            f"--sequence-length {settings.sequence_length}: must lie in {SHORTEST_SEQUENCE}..{LONGEST_SEQUENCE}"
        )
    if not 0 <= settings.validation_fraction < 1:
        raise UserError(
            f"--validation-fraction {settings.validation_fraction}: must lie in [0, 1); the default is 0.01"
        )
    if settings.workers < 1:
        raise UserError(f"--workers {settings.workers}: must be at least 1")
    for language in settings.languages:
        if not LANGUAGE_CODE.fullmatch(language):
            raise UserError(f"--languages {language}: is not a language code such as en or zh-Hant")
    inside = settings.out.resolve()
    if inside == settings.input.resolve() or inside.is_relative_to(settings.input.resolve()):
        raise UserError(f"--out {settings.out}: lies in the input folder; write the shards somewhere else")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made a folder ({error.strerror}); choose another place") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: cannot be written to; choose another place")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {folder}: another shard_text.py is writing there; wait for it") from error
        yield


def _remove_leftovers(folder: Path) -> None:
    """What a killed run left under temporary names."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+\.(partial|old)", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _claim_folder(settings: ShardText, tokenizer: Tokenizer) -> None:
    """Write settings.json and tokenizer/, or check that an earlier run wrote the same."""
    path = settings.out / "settings.json"
    tokenizer_facts = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **{key: getattr(tokenizer, key) for key in ("bos_id", "eos_id", "pad_id", "unk_id", "mask_id")},
        "special_ids": list(tokenizer.special_ids),
    }
    wanted = {"format": FORMAT_VERSION, "sequence_length": settings.sequence_length, "tokenizer": tokenizer_facts}
    if path.exists():
        existing = read_json(path)
        for key, value in wanted.items():
            if existing.get(key) != value:
                before, now = (
                    (str(entry.get("fingerprint"))[:16] if isinstance(entry, dict) else entry)
                    for entry in (existing.get(key), value)
                )
                raise UserError(
                    f"{path}: {key} is {before}, this run has {now}; choose another --out, or remove this one"
                )
    elif any(settings.out.glob("*/part.json")):
        raise UserError(f"{settings.out}: holds shards but no settings.json; choose another --out, or remove this one")
    if not (settings.out / "tokenizer").is_dir():
        with atomic_folder(settings.out / "tokenizer") as temporary:
            tokenizer.save(temporary)
    write_json(path, wanted)


def _recipe_of(settings: ShardText, text: LanguageText) -> dict[str, Any]:
    """What, beside settings.json, decides a language's shards."""
    return {"validation_fraction": settings.validation_fraction, "text": text.fingerprint()}


def _is_done(folder: Path, language: str, recipe: dict[str, Any]) -> bool:
    """Whether a language's shards are there, whole, and made from this text."""
    path = folder / language / "part.json"
    if not path.is_file():
        return False
    try:
        part = read_json(path)
        if part["recipe"] != recipe:
            get_logger().info(f"{language}: text or --validation-fraction changed, doing it again")
            return False
        damaged = [f["path"] for f in part["files"] if not _is_whole(folder / f["path"], f["sha256"])]
    except (UserError, KeyError, TypeError):
        damaged = [f"{language}/part.json"]
    if damaged:
        get_logger().info(f"{damaged[0]}: missing or damaged, doing {language} again")
    return not damaged


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _build_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of every language published in the folder, by this run or an earlier one."""
    languages = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/part.json"))}
    manifest = {**read_json(folder / "settings.json"), "languages": languages}
    return {**manifest, "fingerprint": dataset_fingerprint(manifest)}


def _report(manifest: dict[str, Any], done: list[str]) -> None:
    log = get_logger()
    languages = manifest["languages"]
    unread = [language for language, entry in languages.items() if not entry["files"]]
    if unread:
        log.info(f"warning: no readable document in {', '.join(unread)}")
    bare = [
        language
        for language, entry in languages.items()
        if language not in unread and not entry["validation"]["sequences"]
    ]
    if bare:
        log.info(
            f"warning: no held-out rows in {', '.join(bare)}: too few documents for --validation-fraction; "
            "no evaluation there"
        )
    sequences = sum(entry["train"]["sequences"] for entry in languages.values())
    tokens = sum(entry[split]["tokens"] for entry in languages.values() for split in SPLITS)
    log.info(
        f"{len(languages)} languages ({len(done)} made now), {sequences:,} training sequences, {tokens:,} tokens, "
        f"fingerprint {manifest['fingerprint'][:16]}"
    )
