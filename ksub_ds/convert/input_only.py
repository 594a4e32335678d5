"""Tables for embeddings that only the input reads: as many, and as many rows, as a number of bytes or an error allows.

    bytes     M · d numbers of all tables, K codes a token of log2(M) bits (32 if M > 256), d x d numbers of a rotation
    error     sum of w_n |x_n - e_n|^2 over sum of w_n |x_n - mean|^2

At a given number of bytes two things are chosen by rule. A rotation is kept where it takes at most a tenth of them:
below, the codes that it displaces are worth more. M is halved from 256 until the tables take at most a twelfth, about
where the error is least.
"""

import math
from dataclasses import dataclass

import numpy as np

from ksub_ds.codes.packing import code_bits, packed_bytes
from ksub_ds.codes.product_quantisation import product_quantisation
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.fitting import Fit

MOST_ROWS, FEWEST_ROWS = 256, 16
ROTATION_SHARE = 0.1
TABLES_SHARE = 1 / 12
CLOSE = 0.02  # the search for an error ends when the number of tables is known to so much of itself


@dataclass(frozen=True)
class InputForm:
    """Sizes of the tables of an input-only embedding.

    Attributes:
        num_tables: K.
        table_size: M.
        rotate: whether a d x d rotation stands beside them.
    """

    num_tables: int
    table_size: int
    rotate: bool


def form_of_ratio(ratio: float, num_tokens: int, width: int, itemsize: int, table_size: int | None = None) -> InputForm:
    """Return the sizes with which an embedding takes at most 1/ratio of its bytes.

    Args:
        ratio: the N x d numbers' bytes over the new ones'.
        num_tokens: N.
        width: d.
        itemsize: bytes of a number.
        table_size: M. [by rule]

    Raises:
        UserError: not even one table fits.
    """
    budget = num_tokens * width * itemsize / ratio
    row = width * itemsize  # of all tables together
    rows = table_size or MOST_ROWS
    if table_size is None:
        most = min(TABLES_SHARE * budget, budget - num_tokens)
        while rows > FEWEST_ROWS and (rows > num_tokens or rows * row > most):
            rows //= 2
    rotation = width * width * itemsize
    bits = code_bits(rows)
    rotate = rotation <= min(ROTATION_SHARE * budget, budget - rows * row - num_tokens * packed_bytes(1, bits))
    num_tables = int((budget - rows * row - rotate * rotation) // num_tokens) * 8 // bits
    if num_tables < 1:
        largest = math.floor(num_tokens * row / (rows * row + num_tokens * packed_bytes(1, bits)))
        hint = f"the largest ratio for {num_tokens:,} x {width} is about {largest}"
        if largest < 2:
            hint = "leave --table-size out" if table_size else "so small an embedding is best left as it is"
        raise UserError(
            f"--target-ratio {ratio:g}: {budget:,.0f} bytes hold no code per token and a table of {rows:,} rows; {hint}"
        )
    return InputForm(min(num_tables, width), rows, rotate)


def fit_form(vectors: np.ndarray, form: InputForm, weights: np.ndarray, seed: int = 0) -> tuple[CodeTable, Fit]:
    """Fit codes and tables of given sizes.

    Args:
        vectors: (N, d) float32.
        form: K, M, and whether a rotation is kept; K = d tables have none.
        weights: (N,) how much each token counts.
        seed: of k-means.

    Raises:
        ValueError: as `product_quantisation`.
    """
    # An axis alone in its table is quantised as it is: no rotation spreads anything.
    rotate = form.rotate and form.num_tables < vectors.shape[1]
    found = product_quantisation(vectors, form.num_tables, form.table_size, weights, rotate, seed)
    explained, codes = 0.0, found.table.codes
    for k, rows in enumerate(found.rows):
        explained += float(
            np.bincount(codes[:, k], weights, len(rows)) @ np.square(rows.astype(np.float64)).sum(axis=1)
        )
    square = float(weights @ np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    mean = weights @ vectors / weights.sum()
    spread = max(square - weights.sum() * float(mean @ mean), 1e-30)
    return found.table, Fit(found.rows, found.rotation, max(square - explained, 0.0) / spread)


def fit_to_error(
    vectors: np.ndarray,
    target: float,
    weights: np.ndarray,
    itemsize: int,
    seed: int = 0,
    table_size: int | None = None,
) -> tuple[CodeTable, Fit]:
    """Fit about as few tables as an error allows: the logarithm of the error falls almost evenly with K.

    Args:
        vectors: (N, d) float32.
        target: the largest relative squared error.
        weights: (N,) how much each token counts.
        itemsize: bytes of a number.
        seed: of k-means.
        table_size: M. [256, or the largest power of 2 up to N]

    Raises:
        UserError: K = d tables still lose more.
        ValueError: as `product_quantisation`.
    """
    count, width = vectors.shape
    rows = table_size or min(MOST_ROWS, 2 ** int(math.log2(count)))

    def fit(num_tables: int) -> tuple[CodeTable, Fit]:
        codes = count * packed_bytes(num_tables, code_bits(rows))
        form = InputForm(num_tables, rows, width * width * itemsize <= ROTATION_SHARE * codes)
        result = fit_form(vectors, form, weights, seed)
        get_logger().info(f"{num_tables} tables of {rows} rows: error {result[1].error:.4f}")
        return result

    few, many, best, guess = 0, width, None, max(1, width // 4)
    while best is None or many - few > max(1, CLOSE * many):
        found = fit(guess)
        error = found[1].error
        if error <= target:
            many, best = guess, found
        elif guess == width:
            raise UserError(
                f"--target-error {target:g}: even {width} tables of {rows} rows, the most there can be, "
                f"lose {error:.4g}"
            )
        else:
            few = guess
        slope = math.log(max(error, 1e-12)) / guess  # from K = 0, the mean vector, whose error is 1
        guess = round(math.log(max(target, 1e-12)) / slope + 0.3) if slope < 0 else 0
        most = width if best is None else many - 1
        if not few < guess <= most:
            guess = most if best is None else (few + many) // 2
    return best
