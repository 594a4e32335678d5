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
from ksub_ds.convert.fitting import Fit, Mixing, fit_all
from ksub_ds.vectors.dedicated import with_dedicated

TOKENS_AT_ONCE = 16_384
CLOSE = 0.02  # the search for an error ends when F is known to so much of itself


def dedicate_to_ratio(
    table: CodeTable,
    matrices: Sequence[np.ndarray],
    ratio: float,
    itemsize: int,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate as many tokens as fit into 1/ratio of the bytes of N x d numbers.

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
        UserError: tables, codes and the rows that are dedicated already take more.
    """
    fits = fit_all(matrices, table, mixing, weights)
    count, width = matrices[0].shape
    before, least = count * width * itemsize, _stored(table, fits, width, itemsize)
    room = int((before / ratio - least) // (width * itemsize + table.dedicated.itemsize))
    if room < 0:
        own = f", {table.num_dedicated:,} dedicated rows" if table.num_dedicated else ""
        smaller = "fewer dedicated rows, " if own else ""
        smaller += "--mixing none, " if fits[0].mixing is not None else ""
        raise UserError(
            f"--target-ratio {ratio:g}: codes, tables of {' '.join(map(str, table.table_sizes))} rows{own} take "
            f"1/{before / least:.1f} of the bytes; take a smaller ratio, {smaller}or codes with smaller tables"
        )
    worst = np.argsort(-_lost(table, matrices, fits, weights), kind="stable")[:room]
    if fits[0].mixing is None:
        mixing = "none"  # there is no room for a matrix that only the other tokens want
    return _dedicated(table, matrices, worst, mixing, weights) if room else (table, fits)


def dedicate_to_error(
    table: CodeTable,
    matrices: Sequence[np.ndarray],
    target: float,
    itemsize: int,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate about as few tokens as let an embedding lose no more than a share of the variance.

    Args:
        table: the codes of the N tokens; those that are dedicated already stay so.
        matrices: (N, d) each: the input's, and the decoder's if it has its own.
        target: the largest relative squared error.
        itemsize: bytes of a number.
        mixing: the matrix beside the tables.
        weights: (N,) how much each token counts. [1]

    Returns:
        The codes, and the fit of each matrix.

    Raises:
        UserError: that takes more bytes than N x d numbers.
    """
    fits = fit_all(matrices, table, mixing, weights)
    lost = _lost(table, matrices, fits, weights)
    if lost.sum() <= target:
        return table, fits
    worst = np.argsort(-lost, kind="stable")
    rest = lost.sum() - np.cumsum(lost[worst])
    # Enough with the tables as they are, and too many once these are fitted again to the others alone.
    few, guess, most = 0, 1 + int((rest > target).sum()), len(worst)
    found = None
    while found is None or most - few > max(1, CLOSE * most):
        tried = _dedicated(table, matrices, worst[:guess], mixing, weights)
        if guess == len(worst) or _lost(tried[0], matrices, tried[1], weights).sum() <= target:
            most, found = guess, tried
        else:
            few = guess
        guess = (few + most) // 2 if found is not None else min(len(worst), guess + 1 + guess // 10)
    (count, width), own = matrices[0].shape, found[0].num_dedicated
    if _stored(*found, width, itemsize) >= count * width * itemsize:
        raise UserError(
            f"--target-error {target:g}: {own:,} of {count:,} tokens would keep their rows, and no bytes be saved; "
            "take a larger error, or codes with larger tables"
        )
    return found


def _dedicated(
    table: CodeTable, matrices: Sequence[np.ndarray], ids: np.ndarray, mixing: Mixing, weights: np.ndarray | None
) -> tuple[CodeTable, list[Fit]]:
    """Dedicate more tokens and fit the tables to the others."""
    ids = np.setdiff1d(ids, table.dedicated)
    table = with_dedicated(table, ids, f"the {len(ids)} with the largest error")
    return table, fit_all(matrices, table, mixing, weights)


def _stored(table: CodeTable, fits: Sequence[Fit], width: int, itemsize: int) -> int:
    """Return the bytes of one embedding, codes and A included."""
    return table.stored_bytes(width, itemsize, 0 if fits[0].mixing is None else fits[0].mixing.size)


def _lost(
    table: CodeTable, matrices: Sequence[np.ndarray], fits: Sequence[Fit], weights: np.ndarray | None
) -> np.ndarray:
    """Return what each token adds to the error, (N,) float64; 0 for dedicated ones."""
    weights = np.ones(table.num_tokens) if weights is None else weights
    lost = np.zeros(table.num_tokens)
    for vectors, fit in zip(matrices, fits, strict=True):
        mean = (weights / weights.sum()).astype(vectors.dtype) @ vectors  # float64 would copy N x d numbers
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
