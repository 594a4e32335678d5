"""Labelled rows of a data set of the HuggingFace hub, by `datasets`; rows.py checks them.

All raise UserError where `datasets` cannot load it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ksub_ds.common.errors import UserError


def hub_splits(name: str, part: str) -> Sequence[str]:
    """The splits of a part; none where there is no such part."""
    import datasets

    try:
        return datasets.get_dataset_split_names(name, part)
    except ValueError:  # no such configuration
        return ()
    except Exception as error:  # the hub's client raises many kinds
        raise _unreachable(name, error) from error


def hub_version(name: str) -> str:
    """What changes when the data set does."""
    import datasets

    try:
        return str(datasets.load_dataset_builder(name, "en" if name.endswith("xnli") else "cola").hash)
    except Exception as error:  # the hub's client raises many kinds
        raise _unreachable(name, error) from error


def hub_rows(name: str, part: str, split: str) -> Iterator[tuple[int, Any]]:
    """The rows of a split, numbered from 1."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, part, split=split)
    except Exception as error:  # the hub's client raises many kinds
        raise _unreachable(name, error) from error
    yield from enumerate(loaded, 1)


def _unreachable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(f"--data {name}: no such folder, and `datasets` cannot load it ({reason}); give a folder of files")
