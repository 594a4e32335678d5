"""Tables fitted to the embedding of a trained model under given codes, by least squares.

    X (N, d) the embedding;  e_n = A · concat over k of E_k[f_k(n)];  minimise sum over n of w_n |x_n - e_n|^2

    none         A is the identity: each row is the mean of the sub-vectors that share it, which is exact.
    orthogonal   A is a rotation. With the tables at their means, what is left to choose maximises
                 sum over k of tr(A_k^T S_k A_k), S_k the scatter of the means of table k (A_k: columns of A).
                 Each round takes the orthogonal factor of [S_1 A_1 ... S_K A_K], which never gets worse:
                 OPQ's alternation (Ge et al., 2013), without a pass over X.
    linear       A is any matrix (columns of one table orthonormal): E_k A_k^T is any table of full width and rank
                 d_k. Where no table has more rows than columns (M_k <= d_k), that is any table of full width,
                 and one least squares problem is all. Else tables and A are least squares in turn; the better of two
                 starts, the rotation and the singular vectors of full-width tables, so it is never worse than the
                 rotation.

A cannot be folded into the weights around it: a LayerNorm with a gain of its own stands on either side of the
embedding. So it stays with the tables, d x d fixed numbers (`SubEmbedding.mixing`), one small product per token.

All of it needs X only through Z^T W X and Z^T W Z, Z the (N, sum of M_k) matrix of ones where a token has a code.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from ksub_ds.codes.table import CodeTable, table_widths

Mixing = Literal["linear", "orthogonal", "none"]
ROUNDS = 200
SMALLEST_GAIN = 1e-6  # relative, of one round
LARGEST_FIT = 8_192  # rows of all tables together; beyond, Z^T Z no longer fits and no A is fitted


@dataclass(frozen=True)
class Fit:
    """Fitted tables.

    Attributes:
        tables: K arrays (M_k, d_k) float32.
        mixing: (d, d) float32, or None.
        error: sum of w_n |x_n - e_n|^2 over sum of w_n |x_n - mean|^2; 1 is what a single mean vector gives.
    """

    tables: list[np.ndarray]
    mixing: np.ndarray | None
    error: float


def fit_tables(
    vectors: np.ndarray, table: CodeTable, mixing: Mixing = "linear", weights: np.ndarray | None = None
) -> Fit:
    """Fit tables, and A, to `vectors` under the codes.

    Args:
        vectors: (N, d).
        table: the codes of the N tokens.
        mixing: what A may be. With one table, or with more than 8,192 rows in all, none is used.
        weights: (N,) how much each token counts. [1]

    Raises:
        ValueError: shapes that do not fit, an unknown mixing, weights that are negative or all 0, vectors that are not
            finite.
    """
    count, width = vectors.shape
    weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if count != table.num_tokens or weights.shape != (count,):
        raise ValueError(f"{count:,} vectors and {weights.shape} weights for codes of {table.num_tokens:,} tokens")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ValueError("weights must be finite, not negative, and not all 0")
    if mixing not in get_args(Mixing):
        raise ValueError(f"mixing {mixing!r}: must be one of {', '.join(get_args(Mixing))}")
    sums = _Sums(vectors, table, weights / weights.max())  # of any scale
    if not np.isfinite(sums.square):
        raise ValueError("the embedding has a number that is NaN or infinite; train or fetch the model anew")
    tables = sums.means(np.eye(width))
    best = Fit([each.astype(np.float32) for each in tables], None, sums.error_of_means(tables))
    if mixing == "none" or table.num_tables == 1 or sum(table.table_sizes) > LARGEST_FIT:
        return best
    for tables, matrix in sums.solutions(mixing):
        error = sums.error(tables, matrix)
        if error < best.error:
            best = Fit([each.astype(np.float32) for each in tables], matrix.astype(np.float32), error)
    return best


def fit_all(
    matrices: Sequence[np.ndarray], table: CodeTable, mixing: Mixing = "linear", weights: np.ndarray | None = None
) -> list[Fit]:
    """Fit tables to each matrix of a model, with an A for all of them or for none.

    Args:
        matrices: (N, d) each: the input's, and the decoder's if it has its own.
        table: the codes; dedicated tokens count for nothing.
        mixing: what A may be.
        weights: (N,) how much each token counts. [1]

    Raises:
        ValueError: as `fit_tables`.
    """
    fits = [fit_tables(each, table, mixing, weights_of_shared(table, weights)) for each in matrices]
    if all(fit.mixing is None for fit in fits):
        return fits
    identity = np.eye(matrices[0].shape[1], dtype=np.float32)
    return [fit if fit.mixing is not None else replace(fit, mixing=identity) for fit in fits]


def weights_of_shared(table: CodeTable, weights: np.ndarray | None) -> np.ndarray | None:
    """Return the weights with 0 for the dedicated tokens: their own rows take whatever the tables leave."""
    if not table.num_dedicated:
        return weights
    shared = np.ones(table.num_tokens) if weights is None else np.array(weights, dtype=np.float64)
    shared[table.dedicated] = 0
    return shared if shared.any() else weights  # tokens that are all dedicated still want a common part


class _Sums:
    """Z^T W X and Z^T W Z of one problem, in float64, and what follows from them."""

    def __init__(self, vectors: np.ndarray, table: CodeTable, weights: np.ndarray):
        from scipy.sparse import csr_matrix

        starts = np.concatenate([[0], np.cumsum(table.table_sizes)])
        self.rows = [slice(first, last) for first, last in itertools.pairwise(starts)]
        self.widths = table_widths(vectors.shape[1], table.num_tables)
        edges = np.concatenate([[0], np.cumsum(self.widths)])
        self.columns = [slice(first, last) for first, last in itertools.pairwise(edges)]
        columns = table.codes + starts[:-1]
        ones = csr_matrix(
            (np.ones(columns.size), columns.ravel(), np.arange(0, columns.size + 1, columns.shape[1])),
            shape=(len(columns), int(starts[-1])),
        )
        weighted = ones.multiply(weights[:, None]).tocsr()
        self.projected = np.zeros((ones.shape[1], vectors.shape[1]))
        self.square = 0.0
        total = np.zeros(vectors.shape[1])
        for first in range(0, len(vectors), 8_192):
            part = slice(first, first + 8_192)
            block = vectors[part].astype(np.float64)
            self.projected += weighted[part].T @ block
            self.square += float((np.square(block).sum(axis=1) * weights[part]).sum())
            total += weights[part] @ block
        self.spread = max(self.square - float(total @ total / weights.sum()), 1e-30)
        self.counts = np.asarray(weighted.sum(axis=0)).ravel()
        self.inverse = np.where(self.counts > 0, 1 / np.maximum(self.counts, 1e-30), 0.0)
        self._ones, self._weighted = ones, weighted

    @cached_property
    def gram(self) -> np.ndarray:
        """Z^T W Z."""
        return (self._ones.T @ self._weighted).toarray()

    def solutions(self, mixing: Mixing) -> list[tuple[list[np.ndarray], np.ndarray]]:
        """Tables with their A, the best of which is the answer."""
        exact = all(rows.stop - rows.start <= width for rows, width in zip(self.rows, self.widths, strict=True))
        if mixing == "linear" and exact:
            return [self.full_width()]
        rotation = self.rotation()
        turned = self.means(rotation), rotation
        if mixing == "orthogonal":
            return [turned]
        return [turned, *(self.alternate(*start) for start in (turned, self.full_width()))]

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """(rows among all tables', columns of d) of each table."""
        return zip(self.rows, self.columns, strict=True)

    def means(self, matrix: np.ndarray) -> list[np.ndarray]:
        """Tables of means in the columns of an orthogonal A."""
        return [
            self.inverse[rows, None] * (self.projected[rows] @ matrix[:, columns]) for rows, columns in self.parts()
        ]

    def error_of_means(self, tables: list[np.ndarray]) -> float:
        """The squared error of tables of means with no A, relative to that of the mean vector."""
        pairs = zip(self.rows, tables, strict=True)
        explained = sum(float((self.counts[rows, None] * np.square(part)).sum()) for rows, part in pairs)
        return max(self.square - explained, 0.0) / self.spread

    def error(self, tables: list[np.ndarray], matrix: np.ndarray) -> float:
        """The squared error, relative to that of the mean vector."""
        full = self._full(tables, matrix)
        explained = 2 * float((full * self.projected).sum()) - float((full * (self.gram @ full)).sum())
        return max(self.square - explained, 0.0) / self.spread

    def _full(self, tables: list[np.ndarray], matrix: np.ndarray) -> np.ndarray:
        """(sum of M_k, d) what each row adds to an embedding."""
        return np.concatenate(
            [part @ matrix[:, columns].T for (_, columns), part in zip(self.parts(), tables, strict=True)]
        )

    def rotation(self) -> np.ndarray:
        """The orthogonal A, from two starts: the identity, and the leading axes of each table's scatter in turn."""
        scatters = [self.projected[rows].T @ (self.inverse[rows, None] * self.projected[rows]) for rows in self.rows]
        best = max(
            (self._turn(scatters, start) for start in (np.eye(len(scatters[0])), self._axes(scatters))),
            key=lambda found: found[0],
        )
        return best[1]

    def _turn(self, scatters: list[np.ndarray], matrix: np.ndarray) -> tuple[float, np.ndarray]:
        explained = 0.0
        for _ in range(ROUNDS):
            pushed = np.concatenate(
                [scatter @ matrix[:, columns] for scatter, columns in zip(scatters, self.columns, strict=True)], axis=1
            )
            before, explained = explained, float((matrix * pushed).sum())
            if explained - before <= SMALLEST_GAIN * self.spread:
                break
            left, _, right = np.linalg.svd(pushed)
            matrix = left @ right
        return explained, matrix

    def _axes(self, scatters: list[np.ndarray]) -> np.ndarray:
        rest = np.eye(len(scatters[0]))  # an orthonormal basis of what is not given away yet
        chosen = []
        for scatter, width in zip(scatters, self.widths, strict=True):
            axes = rest @ np.linalg.eigh(rest.T @ scatter @ rest)[1][:, ::-1]
            chosen.append(axes[:, :width])
            rest = axes[:, width:]
        return np.concatenate(chosen, axis=1)

    def full_width(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Tables of full width by least squares, each cut to the d_k leading directions of its own rows."""
        full = np.linalg.lstsq(self.gram, self.projected, rcond=1e-10)[0]
        tables, blocks = [], []
        for rows, width in zip(self.rows, self.widths, strict=True):
            directions = np.linalg.svd(np.sqrt(self.counts[rows, None]) * full[rows])[2][:width].T
            tables.append(full[rows] @ directions)
            blocks.append(directions)
        return tables, np.concatenate(blocks, axis=1)

    def alternate(self, tables: list[np.ndarray], matrix: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Least squares for the tables one by one, then for A, until nothing is gained."""
        tables, matrix = list(tables), matrix.copy()
        error = self.error(tables, matrix)
        for _ in range(ROUNDS):
            for k, (rows, columns) in enumerate(self.parts()):
                full = self._full(tables, matrix)
                full[rows] = 0
                block = matrix[:, columns]
                left = self.inverse[rows, None] * (self.projected[rows] - self.gram[rows] @ full)
                tables[k] = left @ block @ np.linalg.pinv(block.T @ block)
            spread = np.zeros((len(self.counts), len(matrix)))
            for (rows, columns), part in zip(self.parts(), tables, strict=True):
                spread[rows, columns] = part
            matrix = np.linalg.lstsq(spread.T @ self.gram @ spread, spread.T @ self.projected, rcond=1e-10)[0].T
            tables, matrix = self._orthonormal(tables, matrix)
            before, error = error, self.error(tables, matrix)
            if before - error <= SMALLEST_GAIN * before:
                break
        return tables, matrix

    def _orthonormal(self, tables: list[np.ndarray], matrix: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The same embedding with orthonormal columns of A for each table: rows keep the scale of vectors."""
        matrix = matrix.copy()
        for k, columns in enumerate(self.columns):
            basis, scale = np.linalg.qr(matrix[:, columns])
            tables[k], matrix[:, columns] = tables[k] @ scale.T, basis
        return tables, matrix
