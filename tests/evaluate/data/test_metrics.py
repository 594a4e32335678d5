"""Metrics against their published formulas, degenerate predictions, intervals and the paired test."""

import math

import numpy as np
import pytest

from ksub_ds.evaluate.data import metrics
from ksub_ds.evaluate.glue import score


def test_classification_against_the_formulas() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    predictions = np.where(generator.random(300) < 0.7, labels, 1 - labels)
    tp, fp = int(((predictions == 1) & (labels == 1)).sum()), int(((predictions == 1) & (labels == 0)).sum())
    fn, tn = int(((predictions == 0) & (labels == 1)).sum()), int(((predictions == 0) & (labels == 0)).sum())
    scores = metrics.classification(predictions, labels, ("accuracy", "f1", "matthews"))
    assert scores["accuracy"] == pytest.approx((tp + tn) / 300)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))  # van Rijsbergen 1979
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["matthews"] == pytest.approx((tp * tn - fp * fn) / denominator)  # Matthews 1975
    assert (scores["correct"], scores["count"]) == (tp + tn, 300) and "degenerate" not in scores


def test_correlations_against_the_formulas() -> None:
    generator = np.random.default_rng(1)
    labels = generator.random(50) * 5
    predictions = labels + generator.normal(size=50)

    def pearson(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))

    scores = metrics.regression(predictions, labels)
    assert scores["pearson"] == pytest.approx(pearson(predictions, labels))
    positions = [np.argsort(np.argsort(values)).astype(float) for values in (predictions, labels)]
    assert scores["spearman"] == pytest.approx(pearson(*positions))


def test_degenerate_predictions_are_zero_and_said_so() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    one_class = metrics.classification(np.ones(5, int), labels, ("matthews", "accuracy"))
    assert one_class["matthews"] == 0.0 and "every row got the answer 1" in one_class["degenerate"]
    assert metrics.classification(np.zeros(5, int), labels, ("f1",))["f1"] == 0.0
    for constant in (np.full(5, 2.5), np.array([1.0, np.nan, 0, 0, 0]), 2.5 + 1e-12 * np.arange(5)):
        scores = metrics.regression(constant, np.arange(5.0))
        assert (scores["pearson"], scores["spearman"]) == (0.0, 0.0) and "counted as 0" in scores["degenerate"]


def test_stsb_is_scored_as_regression() -> None:
    logits = np.array([[0.1], [2.0], [4.9]], np.float32)
    assert score("stsb", logits, np.array([0.0, 2.5, 5.0]))["spearman"] == pytest.approx(1.0)
    assert score("mrpc", np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.0, 1.0]))["f1"] == 1.0


def test_bootstrap_intervals_have_the_width_of_theory() -> None:
    generator = np.random.default_rng(2)
    right = {name: (generator.random(2_000) < 0.6).astype(float) for name in ("en", "fr")}
    intervals = metrics.bootstrap_intervals(right)
    low, high = intervals["en"]
    expected = 2 * 1.96 * math.sqrt(0.6 * 0.4 / 2_000)
    assert low < right["en"].mean() < high and (high - low) == pytest.approx(expected, rel=0.15)
    alike = metrics.bootstrap_intervals({"en": right["en"], "fr": right["en"]})
    # the rows are parallel: a copy of a language adds no certainty
    assert alike["average"][1] - alike["average"][0] == pytest.approx(high - low, rel=0.1)
    narrower = intervals["average"][1] - intervals["average"][0]
    assert narrower == pytest.approx(expected / math.sqrt(2), rel=0.15)


def test_paired_test() -> None:
    generator = np.random.default_rng(3)
    ours = (generator.random(1_000) < 0.6).astype(float)
    assert metrics.paired_test(ours, ours) == {"difference": 0.0, "p": 1.0}
    better = np.where(generator.random(1_000) < 0.1, 1.0, ours)
    assert metrics.paired_test(better, ours)["p"] < 0.001
    shuffled = generator.permutation(ours)
    assert metrics.paired_test(shuffled, ours)["p"] > 0.05
    # all ten rows that differ favour one side: the exact two-sided p is 2 / 2^10
    ten = np.zeros(100)
    ten[:10] = 1
    assert metrics.paired_test(ten, np.zeros(100))["p"] == pytest.approx(2 / 1024, abs=1.5e-3)


def test_exchange_test_against_the_formulas() -> None:
    """Its scores are scikit-learn's and scipy's; alike models have a large p, a better one a small p."""
    from scipy import stats
    from sklearn.metrics import matthews_corrcoef

    generator = np.random.default_rng(3)
    labels = generator.integers(0, 2, 300)
    good, bad = (np.where(generator.random(300) < part, labels, 1 - labels) for part in (0.9, 0.6))
    found = metrics.exchange_test("matthews", good, bad, labels)
    assert found["difference"] == pytest.approx(matthews_corrcoef(labels, good) - matthews_corrcoef(labels, bad))
    assert found["p"] == pytest.approx(1 / (metrics.SWAPS + 1))
    right = metrics.exchange_test("accuracy", good, bad, labels)
    assert right["difference"] == pytest.approx((good == labels).mean() - (bad == labels).mean()) and right["p"] < 0.01
    assert metrics.exchange_test("accuracy", good, good[::1].copy(), labels) == {"difference": 0.0, "p": 1.0}
    numbers = generator.random(200)
    near, far = numbers + 0.1 * generator.random(200), numbers + generator.random(200)
    ours = metrics.exchange_test("pearson", near, far, numbers)
    assert ours["difference"] == pytest.approx(stats.pearsonr(near, numbers)[0] - stats.pearsonr(far, numbers)[0])
    assert ours["p"] < 0.01 and metrics.exchange_test("pearson", np.ones(200), np.ones(200), numbers)["p"] == 1.0
    noisy = near + 0.8 * generator.random(200)
    for stretched in (3 * far, far - 40):  # correlations do not see it, so the test must not either
        assert metrics.exchange_test("pearson", noisy, stretched, numbers)["p"] == pytest.approx(
            metrics.exchange_test("pearson", noisy, far, numbers)["p"], abs=1e-3
        )
    # under the null p is uniform: about a tenth of the tests come below 0.1
    alike = [generator.integers(0, 2, (3, 60)) for _ in range(60)]
    assert 0 <= sum(metrics.exchange_test("accuracy", *each)["p"] < 0.1 for each in alike) <= 14
