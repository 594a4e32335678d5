"""Facts about a code table and the neighbours of a token: `ksub codes inspect` and `ksub codes neighbours`."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ksub_ds.codes.table import CodeTable
from ksub_ds.codes.trie import build_trie, merge_equal_states


def describe(table: CodeTable, embedding_dim: int) -> list[tuple[str, str]]:
    """Describe a table as (name, value) rows: sizes, use of the code space, leaves, parameters, bytes.

    Args:
        table: the codes.
        embedding_dim: d, the width at which parameters are counted.
    """
    plain = table.num_tokens * embedding_dim
    ours = table.num_parameters(embedding_dim)
    rows = [
        ("algorithm", table.metadata.get("algorithm", "unknown")),
        ("tokens (N)", f"{table.num_tokens:,}"),
        ("tables (K)", f"{table.num_tables}"),
        ("table sizes (M_k)", _runs(table.table_sizes)),
        ("rows in use", _runs([len(np.unique(column)) for column in table.codes.T])),
        *_space_rows(table),
        ("collisions", f"{table.count_collisions()}"),
        *_trie_rows(table),
        (f"parameters at d = {embedding_dim}", f"{ours:,}, against {plain:,} plain: {plain / ours:,.1f} times fewer"),
        *_bytes_rows(table, embedding_dim),
    ]
    if table.num_dedicated:
        own = table.num_dedicated * embedding_dim
        words = f"{table.num_dedicated:,} tokens, {table.num_dedicated / table.num_tokens:.2%} of all: "
        rows.append(("dedicated rows (F)", f"{words}{own:,} of the parameters ({own / ours:.1%})"))
    rows.append(("sha256", table.sha256))
    shown = {"algorithm", "quality"}
    rows += [(key.replace("_", " "), value) for key, value in sorted(table.metadata.items()) if key not in shown]
    return rows + _quality_rows(table.metadata.get("quality"))


def _runs(numbers: Sequence[int]) -> str:
    """Write numbers in a row; from eight on, equal neighbours as one: "83 x 256"."""
    if len(numbers) < 8:
        return " ".join(f"{number:,}" for number in numbers)
    runs = [(len(list(equal)), number) for number, equal in groupby(numbers)]
    return " ".join(f"{times} x {number:,}" if times > 1 else f"{number:,}" for times, number in runs)


def _space_rows(table: CodeTable) -> list[tuple[str, str]]:
    """Say how full the code space is; where codes may repeat, it sets no bound."""
    if not table.unique:
        return []
    space = math.prod(table.table_sizes)
    return [("code space in use", f"{table.num_tokens / space:.2%} of {space:,}")]


def _bytes_rows(table: CodeTable, embedding_dim: int) -> list[tuple[str, str]]:
    """Count the bytes of an input-only embedding, most of which are codes."""
    if table.unique:
        return []
    plain, ours = 4 * table.num_tokens * embedding_dim, table.stored_bytes(embedding_dim)
    words = f"{ours:,} in float32, codes included, against {plain:,} plain: 1/{plain / ours:,.1f}"
    return [(f"bytes at d = {embedding_dim}", words)]


def _trie_rows(table: CodeTable) -> list[tuple[str, str]]:
    """Describe the trie that the exact loss folds along; codes for the input alone have no use for one."""
    if not table.unique:
        return [("decoder", "none: the codes are for the input alone, and tokens may share one")]
    trie = build_trie(table.codes, table.table_sizes)
    leaf_sizes = np.bincount(trie[-1].parent)
    automaton = merge_equal_states(trie)
    states, transitions = sum(level.num_states for level in automaton), sum(len(level.code) for level in automaton)
    return [
        ("leaves", f"{len(leaf_sizes):,} of {leaf_sizes.min():,} to {leaf_sizes.max():,} tokens"),
        ("automaton", f"{states:,} states, {transitions:,} transitions"),
    ]


def _quality_rows(stored: str | None) -> list[tuple[str, str]]:
    """Format the quality report that clustering stores with the codes (quality.py), one row per number or list."""
    if stored is None:
        return []
    try:
        report = json.loads(stored)
    except (ValueError, RecursionError):
        return [("quality", "damaged: not JSON")]
    return [(name.replace("_", " "), value) for name, value in _flatten(report)]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}: {key}" if name else str(key))
    elif isinstance(value, list):
        yield name, "; ".join(_number(each) for each in value)
    else:
        yield name, _number(value)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def code_neighbours(table: CodeTable, token: int, count: int) -> list[tuple[int, int, bool]]:
    """Find the tokens that share most codes with a token.

    Its leaf (all codes but the last the same) comes first, then the number of shared codes decides, then how many
    of the first codes are shared, then the id.

    Args:
        table: the codes.
        token: id of the token.
        count: how many to return, at most.

    Returns:
        Tuples (token id, number of shared codes, whether in the same leaf); only tokens that share a code.

    Raises:
        ValueError: the token is not in the vocabulary.
    """
    if not 0 <= token < table.num_tokens:
        raise ValueError(f"token {token}: the codes are of tokens 0..{table.num_tokens - 1}")
    equal = table.codes == table.codes[token]
    shared = equal.sum(axis=1)
    prefix = np.cumprod(equal, axis=1).sum(axis=1)
    same_leaf = prefix >= table.num_tables - 1 if table.num_tables > 1 else np.zeros(len(equal), dtype=bool)
    order = np.lexsort((np.arange(len(equal)), -prefix, -shared, ~same_leaf))
    found = [int(index) for index in order if index != token and shared[index]][:count]
    return [(index, int(shared[index]), bool(same_leaf[index])) for index in found]
