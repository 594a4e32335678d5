"""The folder form of sentence-transformers: an encoder, and in modules.json what is made of its states.

    modules.json                            [{"path": "", "type": "...Transformer"}, {"path": "1_Pooling", ...}, ...]
    config.json, model.safetensors, ...     the encoder; in older folders in 0_Transformer/
    1_Pooling/config.json
    2_Dense/config.json, model.safetensors

All of it but the encoder stays true when the encoder is compressed. What is written here has the encoder in the root,
where transformers looks for it too. Files are copied as they are, and never opened.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json

MODULES = "modules.json"
OWN_CODE = "sentence_transformers."  # how the types of the library's own modules begin


@dataclass(frozen=True)
class SentenceModule:
    """One entry of modules.json.

    Attributes:
        path: its folder, relative and inside; "" is the root.
        entry: all that modules.json says of it.
    """

    path: str
    entry: dict[str, Any]


def read_modules(folder: Path) -> list[SentenceModule]:
    """Read modules.json; the first module is the encoder. Empty if there is none.

    Raises:
        UserError: it is not of the known form, a path leads out of the folder, or a module needs code of its own.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: is not the list of modules that sentence-transformers writes")
    modules = [SentenceModule(_checked_path(path, entry.get("path")), entry) for entry in entries]
    for number, module in enumerate(modules):
        kind = module.entry.get("type")
        if not isinstance(kind, str) or not kind.startswith(OWN_CODE):
            raise UserError(
                f"{path}: module {number} is a {kind}, which has code of its own; only modules of "
                f"sentence-transformers are carried over. Remove {MODULES} to take the encoder alone"
            )
        if number and not module.path:
            raise UserError(
                f"{path}: module {number} ({kind}) has the encoder's folder; only the encoder may lie there"
            )
    return modules


def _checked_path(source: Path, path: Any) -> str:
    """Return a path of modules.json in its plain form.

    Raises:
        UserError: it is not a relative path inside the folder.
    """
    if not isinstance(path, str):
        raise UserError(f"{source}: path {path!r} of a module is no text")
    if "\0" not in path and "\\" not in path and not PureWindowsPath(path).anchor:
        parts = PurePosixPath(path).parts
        if ".." not in parts:
            return "/".join(parts)
    raise UserError(f"{source}: path {path!r} leads out of the folder")


def encoder_folder(name: str | Path) -> Path | str:
    """Return where the encoder of a sentence encoder lies; any other folder or name is returned as it is.

    Raises:
        UserError: modules.json is not usable, or its first module is not an encoder.
    """
    folder = sentence_folder(name)
    modules = [] if folder is None else read_modules(folder)
    if folder is None or not modules:
        return name
    first = modules[0]
    if not _names_model(folder / first.path / "config.json"):
        raise UserError(
            f"{name}: its first module is a {first.entry['type']} without a config.json that names a model_type in "
            f"{first.path or 'the folder itself'}; only encoders of transformers are read"
        )
    _check_module_files(folder, modules[1:])
    return folder / first.path if first.path else name


def _check_module_files(folder: Path, modules: list[SentenceModule]) -> None:
    """Check that the modules behind the encoder have their settings; a Normalize has none.

    Raises:
        UserError: one has not.
    """
    for module in modules:
        kind = module.entry["type"]
        if not kind.endswith(".Normalize") and not any((folder / module.path).glob("*.json")):
            raise UserError(
                f"{folder / MODULES}: {kind} lies in {module.path}, which has no config.json; get the model anew"
            )


def _names_model(config: Path) -> bool:
    fields = read_json(config) if config.is_file() else None
    return isinstance(fields, dict) and "model_type" in fields


def sentence_folder(name: str | Path) -> Path | None:
    """Return the folder of a sentence encoder: a folder itself, or where a name on the hub lies, its modules fetched.

    Returns:
        The folder; None for a name without modules.json.

    Raises:
        UserError: as `read_modules`.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    try:
        found = cached_file(str(name), MODULES, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None  # no such name, which the opening of the model tells better
    if found is None:
        return None
    below = [f"{module.path}/*" for module in read_modules(Path(found).parent) if module.path]
    return Path(snapshot_download(str(name), allow_patterns=["*.json", *below]))


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copy every module of a sentence encoder but the encoder itself, whose place is the root of `target`.

    Raises:
        UserError: as `read_modules`, or a link leads out of the folder.
    """
    modules = read_modules(source)
    encoder = modules[0].path if modules else ""
    settings = [
        source / "config_sentence_transformers.json",
        *sorted((source / encoder).glob("sentence_*_config.json")),
    ]
    for path in settings:
        if path.is_file():
            _copy(path, target / path.name, source)
    for module in modules[1:]:
        for path in _files(source / module.path):
            _copy(path, target / path.relative_to(source), source)
    if encoder:  # older
        entries = [module.entry for module in modules]
        write_json(target / MODULES, [entries[0] | {"path": ""}, *entries[1:]])
    elif modules:
        _copy(source / MODULES, target / MODULES, source)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; a module without any (Normalize) may have none."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _copy(path: Path, target: Path, root: Path) -> None:
    """Copy one file, through a link only within the folder or into the hub's cache that it belongs to.

    Raises:
        UserError: the link leads elsewhere, or the file cannot be copied.
    """
    real, home = path.resolve(), root.resolve()
    if not any(real.is_relative_to(each) for each in (home, home.parent.parent / "blobs")):
        raise UserError(f"{path}: is a link out of the folder; put the file itself there")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be copied ({error.strerror})") from error
