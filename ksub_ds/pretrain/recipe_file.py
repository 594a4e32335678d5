"""RUN/recipe.json: writing a recipe as JSON, reading it back, and what may change between two starts."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.pretrain.recipe import Recipe

# May change between a start and its continuation: they do not touch what is learnt. The codes and the
# data may move to another folder: their content is compared, not their path.
FREE_KEYS = (
    *(
        "codes",
        "data",
        "out",
        "warm_start",
        "attention",
        "deepspeed",
        "micro_batch_size",
        "max_hours",
        "save_every_steps",
        "keep_last",
    ),
    *("eval_every_steps", "eval_sequences", "log_every_steps"),
)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    values = dataclasses.asdict(recipe)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def from_json(values: Any, path: Path) -> Recipe:
    """The recipe of a RUN/recipe.json (unknown keys belong to the run, not to the recipe).

    Args:
        values: what the file holds.
        path: the file, for the error.

    Raises:
        UserError: not an object, a key is missing, or a value is none the recipe can have.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; the file is damaged, or no recipe of `ksub pretrain`")
    hints = get_type_hints(Recipe)
    known: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{path}: lacks the key {field.name!r}; the file is damaged")
            continue
        value, hint = values[field.name], hints[field.name]
        if not _fits(value, hint):
            choices = f"; it must be one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else ""
            raise UserError(f"{path}: {field.name} cannot be {value!r}{choices}")
        known[field.name] = (
            Path(value) if field.name in ("data", "out", "codes", "warm_start") and value is not None else value
        )
    return Recipe(**known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can stand for a field of this type; a path is a string, a float may be whole."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) in {Path: (str,), float: (float, int)}.get(hint, (hint,))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a RUN/recipe.json, and everything that stands in the file.

    Raises:
        UserError: the file cannot be read, or as `from_json`.
    """
    values = read_json(path)
    return from_json(values, path), values


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two recipe.json contents and may not, as `key: old -> new`.

    A setting that the old file lacks is younger than the run, which went by its default.
    """
    fields = dataclasses.fields(Recipe)
    old = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING} | old
    keys = [key for key in new if key not in FREE_KEYS] + [key for key in old if key not in new]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
