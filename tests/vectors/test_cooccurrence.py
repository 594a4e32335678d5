"""Vectors from co-occurrence against the same recipe written with loops over dense float64 arrays."""

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import token_frequency
from ksub_ds.vectors import cooccurrence
from ksub_ds.vectors.cooccurrence import Cooccurrence, count_pairs, factorise, most_frequent, positive_pmi
from ksub_ds.vectors.sources import load_vectors

N, SPECIAL, WINDOW, CONTEXTS, SMOOTHING = 30, (0, 1, 2, 29), 3, 18, 0.75


@pytest.fixture(scope="module")
def blocks():
    """Three blocks of rows over tokens 0..26, Zipf-like, with special tokens in the middle; 27 and 28 never occur."""
    draw = np.random.default_rng(1)
    share = 1 / np.arange(1, 28)
    return [draw.choice(27, size=(rows, 16), p=share / share.sum()).astype(np.int32) for rows in (5, 9, 2)]


def dense_counts(blocks, contexts):
    counts = np.zeros((N, len(contexts)))
    column = {int(token): index for index, token in enumerate(contexts)}
    for row in np.concatenate(blocks).tolist():
        for i, token in enumerate(row):
            for step in (-1, 1):
                for distance in range(1, WINDOW + 1):
                    j = i + step * distance
                    if not 0 <= j < len(row) or row[j] in SPECIAL or token in SPECIAL:
                        break
                    if row[j] in column:
                        counts[token, column[row[j]]] += 1 / distance
    return counts


def dense_pmi(counts):
    of_token, of_context = counts.sum(1), counts.sum(0)
    share = of_context**SMOOTHING / (of_context**SMOOTHING).sum()
    result = np.zeros_like(counts)
    for t, c in zip(*np.nonzero(counts), strict=True):
        pmi = np.log(counts[t, c] / (of_token[t] * share[c]))
        rarer = min(of_token[t], of_context[c])
        result[t, c] = max(0, pmi) * counts[t, c] / (counts[t, c] + 1) * rarer / (rarer + 1)
    return result


def contexts_of(blocks):
    frequency = token_frequency(blocks, N, SPECIAL)
    assert frequency.sum() == sum((~np.isin(ids, SPECIAL)).sum() for ids in blocks)
    return most_frequent(frequency, CONTEXTS)


def test_counts_and_associations_are_the_textbook_ones(blocks):
    contexts = contexts_of(blocks)
    counts = count_pairs(blocks, N, SPECIAL, contexts, WINDOW)
    expected = dense_counts(blocks, contexts)
    np.testing.assert_allclose(counts.toarray(), expected, rtol=1e-6)
    np.testing.assert_allclose(positive_pmi(counts, SMOOTHING).toarray(), dense_pmi(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dimensions", [4, 300])
def test_vectors_are_the_best_factors(blocks, dimensions):
    contexts = contexts_of(blocks)
    matrix = positive_pmi(count_pairs(blocks, N, SPECIAL, contexts, WINDOW), SMOOTHING)
    vectors = factorise(matrix, dimensions, seed=0)
    left, singular, _ = np.linalg.svd(dense_pmi(dense_counts(blocks, contexts)), full_matrices=False)
    rank = min(dimensions, len(contexts))
    expected = left[:, :rank] * np.sqrt(singular[:rank])
    seen = np.abs(expected).sum(1) > 1e-9
    assert vectors.shape == (N, rank) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[seen] @ vectors[seen].T, expected[seen] @ expected[seen].T, atol=2e-5)


def test_contexts_are_the_most_frequent_and_ties_go_to_the_lower_id():
    np.testing.assert_array_equal(most_frequent(np.array([0, 5, 9, 5, 0, 5]), 3), [1, 2, 3])
    np.testing.assert_array_equal(most_frequent(np.array([0, 5, 0]), 3), [1])


def test_unseen_tokens_stand_near_different_seen_ones(blocks):
    vectors = np.zeros((2000, 70), np.float32)
    seen = np.arange(0, 2000, 10)
    vectors[seen] = np.random.default_rng(0).standard_normal((len(seen), 70))
    cooccurrence.place_unseen(vectors, seen, seed=3)
    unseen = np.setdiff1d(np.arange(2000), seen)
    distance = ((vectors[unseen][:, None] - vectors[seen]) ** 2).sum(-1) ** 0.5
    nearest = distance.argmin(1)
    spread = np.square(vectors[seen] - vectors[seen].mean(0)).sum(1).mean() ** 0.5
    np.testing.assert_allclose(distance.min(1), cooccurrence.UNSEEN_STEP * spread, rtol=1e-3)
    assert np.bincount(nearest, minlength=len(seen)).max() < 30  # 9 on average
    assert len(np.unique(vectors, axis=0)) == 2000
    again = np.zeros_like(vectors)
    again[seen] = vectors[seen]
    cooccurrence.place_unseen(again, seen, seed=3)
    np.testing.assert_array_equal(again, vectors)
    cooccurrence.place_unseen(again, seen, seed=4)
    assert (again[unseen] != vectors[unseen]).any(axis=1).all()


def test_shards_give_one_vector_a_token_and_the_same_ones_again(tiny_shards):
    matrix, description = load_vectors(tiny_shards)
    dataset = ShardDataset.open(tiny_shards)
    assert matrix.shape[0] == dataset.manifest["tokenizer"]["vocab_size"] and np.isfinite(matrix).all()
    assert description.tokenizer.fingerprint == dataset.manifest["tokenizer"]["fingerprint"]
    assert dataset.fingerprint[:16] in description.source
    again, _ = load_vectors(tiny_shards)
    np.testing.assert_array_equal(again, matrix)
    other, _ = load_vectors(tiny_shards, seed=1)
    assert (other != matrix).any()


def test_nearest_vectors_are_words_of_the_same_language(tiny_shards):
    matrix, description = load_vectors(tiny_shards)
    tokens = description.tokenizer.tokens()
    index = [tokens.index(f"▁{word}") for word in ("house", "river", "σπίτι", "ποτάμι")]
    unit = matrix[index] / np.linalg.norm(matrix[index], axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[0, 1] > likeness[0, 2:].max() and likeness[2, 3] > likeness[:2, 2].max()


def test_blocks_and_thinning(tiny_shards, monkeypatch):
    dataset = ShardDataset.open(tiny_shards)
    rows = {language: dataset.num_sequences("train", language) for language in dataset.languages}
    monkeypatch.setattr(cooccurrence, "BLOCK_TOKENS", 10 * dataset.sequence_length)

    def taken(max_tokens):
        ranges = list(cooccurrence._row_ranges(dataset, max_tokens))
        assert max(len(indices) for _, indices in ranges) <= 10
        return {
            language: np.concatenate([indices for owner, indices in ranges if owner == language]) for language in rows
        }

    for language, indices in taken(10**9).items():
        np.testing.assert_array_equal(indices, np.arange(rows[language]))
    for language, indices in taken(sum(rows.values()) * dataset.sequence_length // 2).items():
        assert len(indices) == -(-rows[language] // 2) and set(np.diff(indices)) <= {1, 2}

    in_many = cooccurrence.shard_vectors(dataset, Cooccurrence(dimensions=8))
    monkeypatch.undo()
    np.testing.assert_allclose(in_many @ in_many.T, _gram(dataset), atol=1e-3)


def _gram(dataset):
    in_one = cooccurrence.shard_vectors(dataset, Cooccurrence(dimensions=8))
    return in_one @ in_one.T


def test_text_without_any_association_is_refused():
    from scipy import sparse

    with pytest.raises(UserError, match="no two tokens stand together"):
        factorise(sparse.csr_matrix((5, 3), dtype=np.float32), 2, 0)
