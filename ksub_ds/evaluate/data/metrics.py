"""Scores of predictions, with intervals and paired tests. Formulas are scikit-learn's and scipy's.

A model that answers the same for every row has no correlation with anything: Matthews' coefficient is 0 by
convention, Pearson's and Spearman's are undefined. All three count as 0 here, and `degenerate` says so.
"""

from typing import Any

import numpy as np

RESAMPLES = 1_000
FLIPS = 10_000
SWAPS = 1_000
_AT_ONCE = 250  # resamples in memory together


def classification(predictions: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Return chosen scores of class predictions.

    Args:
        predictions: (n,) class numbers.
        labels: (n,) class numbers.
        names: some of "accuracy", "f1" (of class 1), "macro_f1" (the mean over the classes that occur), "matthews".
    """
    from sklearn import metrics

    scores: dict[str, Any] = {}
    for name in names:
        if name == "accuracy":
            scores[name] = float(metrics.accuracy_score(labels, predictions))
        elif name == "f1":
            scores[name] = float(metrics.f1_score(labels, predictions, zero_division=0))
        elif name == "macro_f1":
            scores[name] = float(metrics.f1_score(labels, predictions, average="macro", zero_division=0))
        else:
            assert name == "matthews", name
            scores[name] = float(metrics.matthews_corrcoef(labels, predictions))
    scores |= {"correct": int((predictions == labels).sum()), "count": len(labels)}
    if len(np.unique(predictions)) == 1 < len(np.unique(labels)):
        scores["degenerate"] = f"every row got the answer {int(predictions[0])}"
    return scores


def regression(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return Pearson's and Spearman's correlation of real predictions with real labels, (n,) each."""
    from scipy import stats

    if not np.isfinite(predictions).all():
        reason = "a prediction is not finite"
    elif np.ptp(predictions) <= 1e-9 * max(1.0, float(np.abs(predictions).max())) or np.ptp(labels) == 0:
        reason = "every row got the same answer"
    else:
        pearson, spearman = stats.pearsonr(predictions, labels)[0], stats.spearmanr(predictions, labels)[0]
        return {"pearson": float(pearson), "spearman": float(spearman), "count": len(labels)}
    return {
        "pearson": 0.0,
        "spearman": 0.0,
        "count": len(labels),
        "degenerate": f"{reason}: the correlation is undefined, counted as 0",
    }


def bootstrap_intervals(right: dict[str, np.ndarray], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile intervals of each accuracy and, under "average", of their unweighted mean.

    Rows are drawn with replacement (Efron and Tibshirani 1993, chapter 13). Sets of equal size are taken as
    parallel, row by row, as XNLI's languages are: they share the drawn rows.

    Args:
        right: for each set (n,) the part of runs that had a row right (0 or 1 with one seed).
        seed: of the draws.
    """
    draws: dict[int, np.ndarray] = {}
    means: dict[str, np.ndarray] = {}
    for count in {len(values) for values in right.values()}:
        names = [name for name, values in right.items() if len(values) == count]
        stacked = np.stack([right[name] for name in names], axis=1).astype(np.float64)
        generator = np.random.default_rng([seed, count])
        parts = []
        for _ in range(0, RESAMPLES, _AT_ONCE):
            weights = generator.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE)
            parts.append(weights @ stacked / count)
        draws[count] = np.concatenate(parts)
        means |= {name: draws[count][:, index] for index, name in enumerate(names)}
    means["average"] = np.mean([means[name] for name in right], axis=0)
    return {name: _interval(values) for name, values in means.items()}


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def paired_test(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Test whether two models differ on the same rows: a two-sided permutation test by flipping signs.

    Args:
        ours: (n,) scores of each row, for example the part of languages and seeds that were right.
        theirs: (n,) the other model's.
        seed: of the signs.

    Returns:
        {"difference", "p"}: mean of ours minus theirs, and the probability of one at least as far from 0 if the two
        were alike.
    """
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    difference_alone = difference[difference != 0]
    observed = float(difference.mean())
    if not len(difference_alone):
        return {"difference": 0.0, "p": 1.0}
    generator = np.random.default_rng(seed)
    extreme = 0
    for _ in range(0, FLIPS, _AT_ONCE):
        signs = generator.integers(0, 2, size=(_AT_ONCE, len(difference_alone)), dtype=np.int8) * 2 - 1
        sums = signs @ difference_alone
        extreme += int((np.abs(sums) >= abs(difference_alone.sum()) * (1 - 1e-12)).sum())
    return {"difference": observed, "p": (extreme + 1) / (FLIPS + 1)}


def exchange_test(
    name: str, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """Test whether a score of two models differs on the same rows, also for scores that are not a mean over rows.

    A two-sided permutation test: were the models alike, their answers to a row could be exchanged.

    Args:
        name: "accuracy"; "matthews", which is the correlation of two classes; or "pearson".
        ours: (n,) answers of one model.
        theirs: (n,) answers of the other.
        labels: (n,) labels.
        seed: of the exchanges.

    Returns:
        {"difference", "p"}, as `paired_test`.
    """

    def score(answers: np.ndarray) -> float:
        return float((answers == labels).mean()) if name == "accuracy" else _correlation(answers, labels)

    if name == "pearson":  # blind to scale and offset, which must not tell the two apart when answers are exchanged
        ours, theirs = _standardised(ours), _standardised(theirs)
    observed = score(ours) - score(theirs)
    generator = np.random.default_rng(seed)
    extreme = 0
    for _ in range(SWAPS):
        swapped = generator.random(len(labels)) < 0.5
        difference = score(np.where(swapped, theirs, ours)) - score(np.where(swapped, ours, theirs))
        extreme += abs(difference) >= abs(observed) * (1 - 1e-12)
    return {"difference": observed, "p": (extreme + 1) / (SWAPS + 1)}


def _standardised(values: np.ndarray) -> np.ndarray:
    """Scale values to mean 0 and standard deviation 1; constant ones become 0."""
    centred = values - values.mean()
    spread = float(centred.std())
    return centred / spread if spread > 0 else centred


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation, 0 where one side is constant."""
    first, second = first - first.mean(), second - second.mean()
    spread = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / spread if spread > 0 else 0.0
