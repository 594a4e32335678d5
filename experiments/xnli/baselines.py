"""Baselines without a language model: logistic regression on words, for the table's first rows.

They show how much of the answer is in the hypothesis alone (Gururangan et al. 2018), and how much in four numbers that
compare the two sentences.
"""

import re
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from ksub_ds.evaluate.data.rows import Rows, RowSource
from ksub_ds.evaluate.data.tasks import XNLI_COLUMNS

WORD = re.compile(r"\w+")


def overlap(rows: Rows) -> np.ndarray:
    """Compare sentences, (n, 4): share of the hypothesis in the premise, Jaccard index, new words, relative length."""
    features = []
    for premise, hypothesis in zip(rows.first, rows.second or [], strict=True):
        given, claimed = set(WORD.findall(premise.lower())), set(WORD.findall(hypothesis.lower()))
        common = len(given & claimed)
        features.append(
            (
                common / max(1, len(claimed)),
                common / max(1, len(given | claimed)),
                len(claimed - given),
                len(claimed) / max(1, len(given)),
            )
        )
    return np.array(features)


def logistic_regression(data: str) -> dict[str, Any]:
    """Train both baselines on English train; return their accuracy on English test."""
    train, test = (RowSource(data).read("en", split, XNLI_COLUMNS) for split in ("train", "test"))
    words = CountVectorizer()
    words_train, words_test = words.fit_transform(train.second), words.transform(test.second)
    features_train, features_test = overlap(train), overlap(test)
    mean, deviation = features_train.mean(axis=0), features_train.std(axis=0)
    both_train = hstack([words_train, csr_matrix((features_train - mean) / deviation)]).tocsr()
    both_test = hstack([words_test, csr_matrix((features_test - mean) / deviation)]).tocsr()

    def accuracy(inputs: Any, test_inputs: Any) -> float:
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit(inputs, train.labels)
        return float(fitted.score(test_inputs, test.labels))

    return {
        "logistic regression, words of the hypothesis": accuracy(words_train, words_test),
        "the same with four overlap features": accuracy(both_train, both_test),
    }
