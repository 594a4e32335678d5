"""What a code table is like, in numbers: `ksub codes inspect`."""

import math

import numpy as np

from ksub_ds.codes.table import CodeTable
from ksub_ds.codes.trie import build_trie, merge_equal_states


def describe(table: CodeTable, embedding_dim: int) -> list[tuple[str, str]]:
    """Facts about a table as (name, value) rows: sizes, use of the code space, leaves, parameters.

    Args:
        embedding_dim: d, the width at which parameters are counted.
    """
    space = math.prod(table.table_sizes)
    trie = build_trie(table.codes, table.table_sizes)
    leaf_sizes = np.bincount(trie[-1].parent)
    automaton = merge_equal_states(trie)
    plain = table.num_tokens * embedding_dim
    ours = table.num_parameters(embedding_dim)
    rows = [
        ("algorithm", table.metadata.get("algorithm", "unknown")),
        ("tokens (N)", f"{table.num_tokens:,}"),
        ("tables (K)", f"{table.num_tables}"),
        ("table sizes (M_k)", " ".join(f"{size:,}" for size in table.table_sizes)),
        ("rows in use", " ".join(f"{len(np.unique(column)):,}" for column in table.codes.T)),
        ("code space in use", f"{table.num_tokens / space:.2%} of {space:,}"),
        ("collisions", f"{table.count_collisions()}"),
        ("leaves", f"{len(leaf_sizes):,} of {leaf_sizes.min():,} to {leaf_sizes.max():,} tokens"),
        ("automaton", f"{sum(level.num_states for level in automaton):,} states, "
                      f"{sum(len(level.code) for level in automaton):,} transitions"),
        (f"parameters at d = {embedding_dim}", f"{ours:,}, against {plain:,} plain: {plain / ours:,.1f} times fewer"),
        ("sha256", table.sha256),
    ]  # fmt: skip
    shown = {"algorithm"}
    return rows + [(key.replace("_", " "), value) for key, value in sorted(table.metadata.items()) if key not in shown]
