"""The folder that token shards are written to: creating it, locking it, tying it to one set of settings.

OUT/settings.json   format, sequence length, tokenizer: the same for every language in the folder
OUT/tokenizer/      a copy of the tokenizer
OUT/manifest.json   written last, when every language is there
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import LEFTOVER, atomic_folder, read_json, remove_path, sha256_file, write_json
from ksub_ds.common.languages import LANGUAGE_PAIR
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.shards.dataset import FORMAT_VERSION, dataset_fingerprint
from ksub_ds.corpus.tokenizers.loading import Tokenizer

SHARD = re.compile(r"(train|validation)-\d{5}\.arrow")
LANGUAGE_FILE = re.compile(rf"{SHARD.pattern}|part\.json|\..*")  # what a language's folder holds; hidden files


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make the folder that an option names.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{option} {folder}: cannot be made a folder ({error.strerror}); choose another place"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: cannot be written to; choose another place")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; the lock ends with the process at the latest.

    Raises:
        UserError: another process holds it, or its file system cannot lock files.
    """
    with open(folder / ".lock", "w") as stream:
        try:
            held = try_lock(stream)
        except OSError as error:
            raise UserError(
                f"--out {folder}: its file system cannot lock files ({error.strerror}); choose another folder"
            ) from error
        if not held:
            raise UserError(f"--out {folder}: another run is writing shards there; wait for it")
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of a killed run."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            remove_path(path)


def check_replaced(out: Path, names: Collection[str], more: Collection[str], read: Iterable[Path]) -> None:
    """Check that what a run replaces in a shards folder was made by such a run, and is not what it reads.

    Args:
        out: the shards folder.
        names: languages and pairs that may be made.
        more: other folders and files that may be made in it.
        read: files and folders that the run reads, or writes besides.

    Raises:
        UserError: a folder was not, or is.
    """
    settings = out / "settings.json"
    ours = settings.is_file()
    if ours and not _is_settings(read_json(settings)):
        raise UserError(f"--out {out}: {settings.name} is not a settings file of shards; choose another folder")
    for name in (*names, *more):
        path = out / name
        made = ours if name in more else _holds_shards_only(path) and (ours or (path / "part.json").is_file())
        if path.is_symlink() and not made:
            raise UserError(f"--out {out}: {path} is a link and would be replaced; let {out} itself lead elsewhere")
        if path.exists() and not made and not (path.is_dir() and not any(path.iterdir())):
            others = [each.name for each in _others(path)] if (path / "part.json").is_file() else []
            what = f"in which {min(others)!r} lies, which" if others else "which"
            raise UserError(
                f"--out {out}: would replace {path}, {what} no run of this program made; choose another folder"
            )
        for each in read:
            if each.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--out {out}: would replace {path}, where {each} lies; choose another folder")


def _holds_shards_only(folder: Path) -> bool:
    """Return whether a folder holds nothing but a language, or what is left of one: half removed, or half copied."""
    return folder.is_dir() and not _others(folder)


def _others(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not LANGUAGE_FILE.fullmatch(path.name)]


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and {"format", "sequence_length", "tokenizer"} <= value.keys()


def claim_folder(folder: Path, sequence_length: int, tokenizer: Tokenizer) -> None:
    """Write settings.json, or check that an earlier run wrote the same; one that made no row does not bind this one.

    Args:
        folder: of the shards.
        sequence_length: T.
        tokenizer: that makes the rows.

    Raises:
        UserError: the folder holds shards of another sequence length or tokenizer.
    """
    path = folder / "settings.json"
    tokenizer_facts = {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        **{key: getattr(tokenizer, key) for key in ("bos_id", "eos_id", "pad_id", "unk_id", "mask_id")},
        "special_ids": list(tokenizer.special_ids),
    }
    wanted = {"format": FORMAT_VERSION, "sequence_length": sequence_length, "tokenizer": tokenizer_facts}
    if path.exists():
        existing = read_json(path)
        changed = next((key for key in wanted if existing.get(key) != wanted[key]), None)
        if changed is not None and any(map(has_rows, parts(folder))):
            before, now = (
                (str(entry.get("fingerprint"))[:16] if isinstance(entry, dict) else entry)
                for entry in (existing.get(changed), wanted[changed])
            )
            raise UserError(
                f"{path}: {changed} is {before}, this run has {now}; choose another --out, or remove this one"
            )
        if changed is not None:
            for part in parts(folder):
                remove_path(part.parent)
            if existing.get("tokenizer") != tokenizer_facts:
                remove_path(folder / "tokenizer")
    elif parts(folder):
        raise UserError(f"{folder}: holds shards but no settings.json; choose another --out, or remove this one")
    write_json(path, wanted)
    if tokenizer.mask_id is None:
        get_logger().info(f"the tokenizer has no mask token: {folder} is for causal models (--objective clm)")


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the copy of the tokenizer, unless it exists."""
    if not (folder / "tokenizer").is_dir():
        with atomic_folder(folder / "tokenizer") as temporary:
            tokenizer.save(temporary)


def is_whole(path: Path, sha256: str) -> bool:
    """Return whether a file exists with this content."""
    return path.is_file() and sha256_file(path) == sha256


def parts(folder: Path) -> list[Path]:
    """Return the part.json of every published language and pair, those under temporary names left out."""
    return sorted(path for path in folder.glob("*/part.json") if not path.parent.name.startswith("."))


def has_rows(part: Path) -> bool:
    """Return whether the shards of a part.json have rows; where it is damaged, they may."""
    try:
        return bool(read_json(part)["files"])
    except (UserError, KeyError, TypeError):
        return True


def build_manifest(folder: Path, languages: Collection[str] | None = None) -> dict[str, Any]:
    """Build the manifest of languages, and of pairs with rows, published by this run or an earlier one.

    Args:
        folder: of the shards.
        languages: to list, pairs by their names among them; None = all there are.

    Returns:
        The manifest.
    """
    there = {path.parent.name: path for path in parts(folder)}
    entries = {name: read_json(path) for name, path in there.items() if languages is None or name in languages}
    pairs = {name: entries.pop(name) for name in list(entries) if LANGUAGE_PAIR.fullmatch(name)}
    pairs = {name: entry for name, entry in pairs.items() if entry["files"]}
    manifest = {**read_json(folder / "settings.json"), "languages": entries, **({"pairs": pairs} if pairs else {})}
    return {**manifest, "fingerprint": dataset_fingerprint(manifest)}
