"""Folders that `datasets` wrote with save_to_disk: which of their files are the data.

    FOLDER/state.json  data-00000-of-00002.arrow ...                a Dataset
    FOLDER/dataset_dict.json  train/state.json  test/state.json     a DatasetDict

state.json names the files. What map() and filter() leave beside them (cache-*.arrow) holds the same rows again, or
other ones, and is not part of the data set.
"""

import json
import re
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIPTION = "dataset_info.json"  # beside the data
CACHE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
TRAIN = "train"
_LONGEST_STATE = 10_000_000  # bytes


def is_saved(folder: Path) -> bool:
    """Return whether save_to_disk wrote a folder.

    Args:
        folder: any.
    """
    if (folder / SPLITS).is_file():
        return isinstance(_read(folder / SPLITS).get("splits"), list)
    return (folder / STATE).is_file() and "_data_files" in _read(folder / STATE)


def saved_files(folder: Path) -> list[Path]:
    """Return the data files of a saved data set, in order; of several splits, those of "train".

    Args:
        folder: for which `is_saved` is true.

    Raises:
        UserError: no train split, a file is missing, or the rows are chosen by an index that is kept beside them.
    """
    if (folder / SPLITS).is_file():
        if not is_saved(folder / TRAIN):
            splits = ", ".join(sorted(map(str, _read(folder / SPLITS)["splits"]))) or "nothing"
            raise UserError(f"{folder}: is a saved data set without a split {TRAIN!r}, only {splits}; give one of them")
        folder = folder / TRAIN
    state = _read(folder / STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: an old `datasets` saved it with an index of rows; open it there and save it again, after "
            "flatten_indices()"
        )
    files = []
    for entry in state["_data_files"] if isinstance(state["_data_files"], list) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / STATE}: names no file of its folder ({name!r}); save the data set again")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {STATE} names {name}, which is not there; copy the whole folder again")
        files.append(folder / name)
    return files


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one if the file holds none."""
    try:
        with open(path, "rb") as stream:
            value = json.loads(stream.read(_LONGEST_STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
