"""Exact statistics of a stream of vectors: similarities without pairs, PCA without the matrix.

Paper, section 4.4 and 4.5 (after Ethayarajh 2019 and Cai et al. 2021). With u the unit vector of a state, n_t the
occurrences of token type t, and U_t the sum of their u,

    S_intra = mean over types with n_t >= 2 of    (|U_t|^2 - n_t) / (n_t (n_t - 1))
    S_inter = (|sum_t m_t|^2 - sum_t |m_t|^2) / (T (T - 1)),    m_t = U_t / n_t, T types

since the sum of cos(a, b) over all pairs of a set is the squared length of the sum of its unit vectors, less the
pairs of a vector with itself. Every type weighs the same, however often it occurs; each number is the expectation
that the papers estimate by drawing pairs, in O(n d) instead of O(n^2 d).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """Mean cosine similarities of one layer; None where there is no pair to take the mean of.

    Attributes:
        inter: between states of different token types.
        intra: between states of the same type, over the `repeated_types` that occur at least twice.
    """

    inter: float | None
    intra: float | None
    types: int
    repeated_types: int


class SimilarityEstimator:
    """S_inter and S_intra of one layer, exact, from its states in any order.

    Args:
        counts: (N,) how often each token type will occur; types that occur once need no memory here.
        dim: d. The memory is 8 d bytes a type that repeats.
    """

    def __init__(self, counts: np.ndarray, dim: int):
        repeated = np.flatnonzero(counts >= 2)
        row = np.full(len(counts), -1, dtype=np.int64)
        row[repeated] = np.arange(len(repeated))
        self._row_of_type = torch.from_numpy(row)
        self._counts = torch.from_numpy(counts[repeated]).double()
        self._left = int(counts.sum())
        self._types = int((counts > 0).sum())
        self._unit_sums = torch.zeros(len(repeated), dim, dtype=torch.float64)  # U_t
        self._own_pairs = torch.zeros(len(repeated), dtype=torch.float64)  # n_t, less any zero vectors
        self._mean_of_singles = torch.zeros(dim, dtype=torch.float64)  # their part of sum_t m_t
        self._square_of_singles = 0.0  # and of sum_t |m_t|^2

    def add(self, types: Tensor, states: Tensor) -> None:
        """Add (n,) token ids and their (n, d) states. A state of length 0 has cosine 0 with everything."""
        units = torch.nn.functional.normalize(states.double(), dim=1, eps=1e-300)
        squares = units.square().sum(dim=1)
        rows = self._row_of_type[types]
        single = rows < 0
        self._mean_of_singles += units[single].sum(dim=0)
        self._square_of_singles += float(squares[single].sum())
        self._unit_sums.index_add_(0, rows[~single], units[~single])
        self._own_pairs.index_add_(0, rows[~single], squares[~single])
        self._left -= len(types)

    def result(self) -> Similarity:
        """Return the similarities of all states added, which must be those that `counts` announced."""
        assert self._left == 0, f"{self._left} announced states were not added"
        counts, squares = self._counts, self._unit_sums.square().sum(dim=1)
        total = (self._unit_sums / counts.unsqueeze(1)).sum(dim=0) + self._mean_of_singles
        own = float((squares / counts.square()).sum()) + self._square_of_singles
        types, repeated = self._types, len(counts)
        intra = (squares - self._own_pairs) / (counts * (counts - 1))
        return Similarity(
            inter=(float(total.square().sum()) - own) / (types * (types - 1)) if types > 1 else None,
            intra=float(intra.mean()) if repeated else None,
            types=types,
            repeated_types=repeated,
        )


@dataclass(frozen=True)
class PrincipalAxes:
    """What a PCA found.

    Attributes:
        mean: (d,) float64.
        variances: (d,) eigenvalues of the covariance, falling.
        axes: (3, d) the first principal axes (fewer when d < 3).
        count: how many vectors.
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor
    count: int

    def explained(self, p: int) -> float:
        """Return r_p: the part of the variance on the first p axes (paper, section 4.4); 0 for equal vectors."""
        total = float(self.variances.sum())
        return float(self.variances[:p].sum()) / total if total > 0 else 0.0

    def project(self, states: Tensor) -> np.ndarray:
        """Return the (n, 3) coordinates of (n, d) states, float32."""
        return ((states.double() - self.mean) @ self.axes.t()).float().numpy()


class PrincipalAxesEstimator:
    """Mean, covariance and principal axes of a stream of vectors. Memory: d x d."""

    def __init__(self, dim: int):
        self._shift: Tensor | None = None  # near the mean, so that little cancels when the mean is taken off
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)
        self._count = 0

    def add(self, states: Tensor) -> None:
        """Add (n, d) vectors."""
        if not len(states):
            return
        states = states.double()
        if self._shift is None:
            self._shift = states.mean(dim=0)
        states = states - self._shift
        self._sum += states.sum(dim=0)
        self._products.addmm_(states.t(), states)
        self._count += len(states)

    def result(self) -> PrincipalAxes:
        """Return the axes of all vectors added; the largest entry of each axis is positive."""
        assert self._shift is not None, "no vectors were added"
        offset = self._sum / self._count
        covariance = self._products / self._count - torch.outer(offset, offset)
        values, vectors = torch.linalg.eigh(covariance)
        axes = vectors.flip(1)[:, :3].t().contiguous()
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return PrincipalAxes(
            mean=self._shift + offset,
            variances=values.flip(0).clamp_min(0),
            axes=axes * torch.where(largest < 0, -1.0, 1.0),
            count=self._count,
        )
