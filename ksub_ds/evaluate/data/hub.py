"""The HuggingFace hub: names checked within seconds, and labelled data sets read by `datasets`.

Its clients ask an unreachable hub for half a minute a file, so `require_on_hub` asks first.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ksub_ds.common.errors import UserError, one_line

HUB_SECONDS = 10


def require_on_hub(what: str, name: str, kind: Literal["model", "dataset"], file: str) -> None:
    """Refuse what is neither in the local cache nor on the hub.

    Args:
        what: how the message calls it.
        name: such as xlm-roberta-base or facebook/xnli.
        kind: of the repository.
        file: one that the cache holds if it holds the repository.

    Raises:
        UserError: no such name, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, file, repo_type=kind), str) or _prepared(name, kind):
            return
        if not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
            return
        reason = "HF_HUB_OFFLINE is set"
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(f"{what}: is neither a folder nor a {kind} on the hub; check the name") from None
    except Exception as error:  # of the HTTP library, which changes
        reason = one_line(error)
    raise UserError(f"{what}: is not a folder, not in the hub's cache, and the hub cannot be asked ({reason})")


def cached_folder(name: str) -> Path | None:
    """Return where the local cache keeps the files of a model; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", repo_type="model")
    return Path(config).parent if isinstance(config, str) else None


def _prepared(name: str, kind: str) -> bool:
    """Return whether `datasets` keeps the data set in its own cache."""
    if kind != "dataset":
        return False
    from datasets import config

    folder = name.replace("/", "___").lower()
    return any(each.name.lower() == folder for each in Path(config.HF_DATASETS_CACHE).glob("*"))


def hub_splits(name: str, part: str) -> Sequence[str]:
    """Return the splits of a part of a data set; none where there is no such part.

    Raises:
        UserError: `datasets` cannot load it.
    """
    import datasets

    try:
        return datasets.get_dataset_split_names(name, part)
    except ValueError:  # no such configuration
        return ()
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(_unreachable(name, error)) from error


def hub_version(name: str) -> str:
    """Return a text that changes when the data set does.

    Raises:
        UserError: `datasets` cannot load it.
    """
    import datasets

    try:
        return str(datasets.load_dataset_builder(name, "en" if name.endswith("xnli") else "cola").hash)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(_unreachable(name, error)) from error


def hub_class_names(name: str, part: str, column: str) -> tuple[str, ...] | None:
    """Return the class names of a column's numbers; None where the data set names none.

    Args:
        name: of the data set.
        part: its configuration.
        column: that holds the labels.

    Raises:
        UserError: `datasets` cannot load it.
    """
    import datasets

    try:
        features = datasets.load_dataset_builder(name, part).info.features or {}
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(_unreachable(name, error)) from error
    feature = features.get(column)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def hub_rows(name: str, part: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a split, numbered from 1 and not checked.

    Args:
        name: of the data set.
        part: its configuration.
        split: of the rows.

    Yields:
        (number, row).

    Raises:
        UserError: `datasets` cannot load it.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, part, split=split)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(_unreachable(name, error)) from error
    yield from enumerate(loaded, 1)


def _unreachable(name: str, error: Exception) -> str:
    reason = one_line(error)
    return f"--data {name}: no such folder, and `datasets` cannot load it ({reason}); give a folder of files"
