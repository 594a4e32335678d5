"""Rows of their own for the tokens that small tables serve worst: as many as a number of bytes, or an error, allows.

For models that predict tokens. Their tables stay few, since the exact softmax is a sum over all of them; what a target
decides is F, how many tokens keep the row that they have.

    lost_n    w_n |x_n - e_n|^2, with tables fitted to all tokens; the F largest are dedicated
    bytes     tables, codes, the d x d matrix, and for each of the F tokens d numbers and its id
    error     sum of lost_n of all other tokens over sum of w_n |x_n - mean|^2

Then the tables are fitted again, to the other tokens alone. Where input and decoder have a matrix each, a token is
dedicated in both, and the error is the mean of both.
"""

from collections.abc import Sequence

import numpy as np

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.fitting import Fit, Mixing, fit_tables, weights_of_shared
from ksub_ds.vectors.dedicated import with_dedicated

TOKENS_AT_ONCE = 16_384


def dedicate_to_ratio(
    table: CodeTable,
    matrices: Sequence[np.ndarray],
    ratio: float,
    itemsize: int,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate as many tokens as fit into 1/ratio of the bytes of a model's embeddings.

    Args:
        table: the codes of the N tokens; those that are dedicated already stay so.
        matrices: (N, d) each: the input's, and the decoder's if it has its own.
        ratio: the bytes of the matrices over those of the new ones.
        itemsize: bytes of a number.
        mixing: the matrix beside the tables.
        weights: (N,) how much each token counts. [1]

    Returns:
        The codes, and the fit of each matrix.

    Raises:
        UserError: tables and codes alone take more.
    """
    fits = _fitted(table, matrices, mixing, weights)
    count, width = matrices[0].shape
    numbers = 0 if fits[0].mixing is None else fits[0].mixing.size
    before, least = count * width * itemsize, table.stored_bytes(width, itemsize, numbers)
    room = int((before / ratio - least) // (width * itemsize + table.dedicated.itemsize))
    if room < 0:
        smaller = " --mixing none," if numbers else ""
        raise UserError(
            f"--target-ratio {ratio:g}: codes and tables of {' '.join(map(str, table.table_sizes))} rows alone take "
            f"1/{before / least:.1f} of the bytes; take a smaller ratio,{smaller} or a smaller --table-size"
        )
    lost = _lost(table, matrices, fits, weights)
    return _dedicate(table, matrices, mixing, weights, np.argsort(-lost, kind="stable")[:room], fits)


def dedicate_to_error(
    table: CodeTable,
    matrices: Sequence[np.ndarray],
    target: float,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate about as few tokens as let an embedding lose no more than a share of the variance.

    Args:
        table: the codes of the N tokens; those that are dedicated already stay so.
        matrices: (N, d) each: the input's, and the decoder's if it has its own.
        target: the largest relative squared error.
        mixing: the matrix beside the tables.
        weights: (N,) how much each token counts. [1]

    Returns:
        The codes, and the fit of each matrix.
    """
    fits = _fitted(table, matrices, mixing, weights)
    while (lost := _lost(table, matrices, fits, weights)).sum() > target:  # a second time only where A got worse
        worst = np.argsort(-lost, kind="stable")
        rest = lost.sum() - np.cumsum(lost[worst])
        table, fits = _dedicate(table, matrices, mixing, weights, worst[: 1 + int((rest > target).sum())], fits)
    return table, fits


def _fitted(table: CodeTable, matrices: Sequence[np.ndarray], mixing: Mixing, weights: np.ndarray | None) -> list[Fit]:
    return [fit_tables(each, table, mixing, weights_of_shared(table, weights)) for each in matrices]


def _dedicate(
    table: CodeTable,
    matrices: Sequence[np.ndarray],
    mixing: Mixing,
    weights: np.ndarray | None,
    ids: np.ndarray,
    fits: list[Fit],
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate more tokens and fit the tables to the others."""
    ids = np.setdiff1d(ids, table.dedicated)
    if not len(ids):
        return table, fits
    get_logger().info(
        f"{len(ids):,} of {table.num_tokens:,} tokens, those that the tables serve worst, keep their rows"
    )
    table = with_dedicated(table, ids, f"the {len(ids)} with the largest error")
    return table, _fitted(table, matrices, mixing, weights)


def _lost(
    table: CodeTable, matrices: Sequence[np.ndarray], fits: Sequence[Fit], weights: np.ndarray | None
) -> np.ndarray:
    """Return what each token adds to the error, (N,) float64; 0 for dedicated ones."""
    weights = np.ones(table.num_tokens) if weights is None else weights
    lost = np.zeros(table.num_tokens)
    for vectors, fit in zip(matrices, fits, strict=True):
        mean = (weights / weights.sum()) @ vectors
        distance, spread = np.empty(table.num_tokens), 0.0
        for first in range(0, table.num_tokens, TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            rows = [each[codes] for each, codes in zip(fit.tables, table.codes[part].T, strict=True)]
            shared = np.concatenate(rows, axis=1)
            shared = shared if fit.mixing is None else shared @ fit.mixing.T
            distance[part] = weights[part] * np.square(vectors[part] - shared, dtype=np.float64).sum(axis=1)
            spread += float(weights[part] @ np.square(vectors[part] - mean).sum(axis=1))
        lost += distance / max(spread, 1e-30) / len(matrices)
    lost[table.dedicated] = 0
    return lost
