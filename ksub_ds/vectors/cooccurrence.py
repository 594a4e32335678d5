"""Vectors of tokens from running text alone: co-occurrence, positive PMI, randomised SVD.

No pretrained model is needed: the shards that a model will be trained on also show which tokens occur in the same
contexts. The recipe is the classical one (Levy, Goldberg & Dagan 2015): counts within a window, each pair
weighted by 1 / distance; positive pointwise mutual information with the context distribution raised to 0.75;
Pantel & Lin's (2002) discount, which shrinks the association of rare tokens; the best rank-p factors U S V,
and rows U sqrt(S).

Special tokens are not counted and no window reaches across one, so a window stays in its document. Contexts are
the most frequent tokens only.

A token without a positive association (it never occurs, or occurs once beside nothing common) gives no information
about where it belongs. It gets the vector of a seen token drawn by a hash of (seed, id), plus a short step of its
own, +-1 per dimension from the same hash. So unseen tokens are spread like the seen ones: a balanced clustering
then divides the *seen* tokens among all clusters. At one common point (their mean, say) they would fill whole
clusters of their own, and crowd the seen ones into what is left.

    N tokens, C contexts, p dimensions, B rows of T tokens at a time
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress, get_logger
from ksub_ds.corpus.masking import derive_key, mix64
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.statistics import token_frequency

BLOCK_TOKENS = 1 << 20  # tokens counted at once; 200 MB at a window of 5
UNSEEN_STEP = (
    0.1  # length of an unseen token's own step, over the seen tokens' root mean square distance from their mean
)


@dataclass(frozen=True)
class Cooccurrence:
    """Settings of the recipe.

    Attributes:
        dimensions: p; fewer when there are not so many tokens or contexts.
        window: how far to each side a context may stand.
        contexts: C, how many of the most frequent tokens count as contexts.
        smoothing: exponent on the context distribution.
        max_tokens: text beyond this is thinned, evenly over each language, so that memory stays bounded.
        seed: of the randomised SVD and of the unseen tokens' directions.
    """

    dimensions: int = 256
    window: int = 5
    contexts: int = 20_000
    smoothing: float = 0.75
    max_tokens: int = 50_000_000
    seed: int = 0


def shard_vectors(dataset: ShardDataset, settings: Cooccurrence) -> np.ndarray:
    """Make vectors from the training part of a shards folder.

    Args:
        dataset: the shards.
        settings: of the recipe above.

    Returns:
        (N, p) float32.

    Raises:
        UserError: the shards hold no text to count.
    """
    tokenizer = dataset.manifest["tokenizer"]
    special = tuple(tokenizer["special_ids"])
    blocks = list(_row_ranges(dataset, settings.max_tokens))
    with Progress(2 * len(blocks), "blocks", "counting co-occurrence") as progress:

        def rows() -> Iterator[np.ndarray]:
            for language, indices in blocks:
                yield dataset.gather("train", indices, language)
                progress.advance()

        frequency = token_frequency(rows(), tokenizer["vocab_size"], special)
        if np.count_nonzero(frequency) < 2:
            raise UserError(f"{dataset.folder}: holds fewer than two different tokens; give shards with more text")
        contexts = most_frequent(frequency, settings.contexts)
        counts = count_pairs(rows(), len(frequency), special, contexts, settings.window)
    get_logger().info(
        f"co-occurrence: {int(frequency.sum()):,} tokens, {np.count_nonzero(frequency):,} of {len(frequency):,} "
        f"seen, {counts.nnz:,} pairs with {len(contexts):,} contexts"
    )
    return factorise(positive_pmi(counts, settings.smoothing), settings.dimensions, settings.seed)


def _row_ranges(dataset: ShardDataset, max_tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (language, row numbers) of each block: all rows, or every n-th if there is more text than `max_tokens`."""
    total = sum(dataset.num_sequences("train", language) for language in dataset.languages)
    share = min(1.0, max_tokens / max(1, total * dataset.sequence_length))
    rows_per_block = max(1, BLOCK_TOKENS // dataset.sequence_length)
    for language in dataset.languages:
        available = dataset.num_sequences("train", language)
        taken = int(np.ceil(available * share))
        indices = np.arange(taken, dtype=np.int64) * available // max(taken, 1)
        for first in range(0, taken, rows_per_block):
            yield language, indices[first : first + rows_per_block]


def most_frequent(frequency: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` most frequent tokens that occur at all, ascending; ties go to the lower id."""
    order = np.argsort(-frequency, kind="stable")[:count]
    return np.sort(order[frequency[order] > 0])


def count_pairs(
    blocks: Iterable[np.ndarray], num_tokens: int, special_ids: tuple[int, ...], contexts: np.ndarray, window: int
) -> Any:
    """Count (token, context) pairs within the window, in both directions, each weighted by 1 / distance.

    Blocks are summed pairwise like a binary counter: each entry is copied log(blocks) times, not once per block.

    Args:
        blocks: (B, T) token ids each.
        num_tokens: N.
        special_ids: tokens that no window reaches across.
        contexts: (C,) ids of the contexts.
        window: how far to each side a context may stand.

    Returns:
        (N, C) CSR matrix, float32.
    """
    column = np.full(num_tokens, -1, dtype=np.int32)
    column[contexts] = np.arange(len(contexts), dtype=np.int32)
    is_special = np.zeros(num_tokens, dtype=bool)
    is_special[list(special_ids)] = True
    partial: list[tuple[int, Any]] = []  # (blocks in it, counts), fewer and fewer blocks
    for ids in blocks:
        size, counts = 1, _count_block(ids, column, is_special, len(contexts), window)
        while partial and partial[-1][0] == size:
            counts += partial.pop()[1]
            size *= 2
        partial.append((size, counts))
    total = partial.pop()[1]
    while partial:
        total += partial.pop()[1]
    return total


def _count_block(ids: np.ndarray, column: np.ndarray, is_special: np.ndarray, num_contexts: int, window: int) -> Any:
    from scipy import sparse

    special = is_special[ids]
    stretch = np.cumsum(special, axis=1, dtype=np.int32)  # equal on both ends: no special token in between
    stretch[special] = -1
    columns = column[ids]
    rows_of, columns_of, weights = [], [], []
    for distance in range(1, min(window, ids.shape[1] - 1) + 1):
        left, right = np.s_[:, :-distance], np.s_[:, distance:]
        together = (stretch[left] == stretch[right]) & (stretch[left] >= 0)
        for token, context in ((left, right), (right, left)):
            chosen = together & (columns[context] >= 0)
            rows_of.append(ids[token][chosen])
            columns_of.append(columns[context][chosen])
            weights.append(np.full(len(rows_of[-1]), 1 / distance, dtype=np.float32))
    shape = (len(column), num_contexts)
    if not rows_of:
        return sparse.csr_matrix(shape, dtype=np.float32)
    pairs = (np.concatenate(weights), (np.concatenate(rows_of), np.concatenate(columns_of)))
    return sparse.coo_matrix(pairs, shape=shape).tocsr()


def positive_pmi(counts: Any, smoothing: float) -> Any:
    """Replace counts by max(0, PMI) with smoothed contexts and discounted rare pairs.

    PMI(t, c) = log(n_tc n / (n_t n_c^a)), where n = sum of n_c^a. Discount (Pantel & Lin 2002):
    n_tc / (n_tc + 1) x min(n_t, n_c) / (min(n_t, n_c) + 1).

    Args:
        counts: (N, C) CSR matrix; its values are overwritten.
        smoothing: the exponent a.

    Returns:
        `counts`, without its zeros.
    """
    of_token = np.asarray(counts.sum(axis=1, dtype=np.float64)).reshape(-1)
    of_context = np.asarray(counts.sum(axis=0, dtype=np.float64)).reshape(-1)
    smoothed = np.where(of_context > 0, of_context, 1.0) ** smoothing
    smoothed /= smoothed[of_context > 0].sum() or 1.0
    log_token, log_context = np.log(np.where(of_token > 0, of_token, 1.0)), np.log(smoothed)
    step = 1 << 24  # pairs at a time: the float64 temporaries stay small
    row_of = np.repeat(np.arange(counts.shape[0], dtype=np.int32), np.diff(counts.indptr))
    for first in range(0, counts.nnz, step):
        part = slice(first, first + step)
        rows, columns = row_of[part], counts.indices[part]
        together = counts.data[part].astype(np.float64)
        association = np.log(together) - log_token[rows] - log_context[columns]
        rarer = np.minimum(of_token[rows], of_context[columns])
        association *= together / (together + 1) * rarer / (rarer + 1)
        counts.data[part] = np.maximum(association, 0)
    counts.eliminate_zeros()
    return counts


def factorise(matrix: Any, dimensions: int, seed: int) -> np.ndarray:
    """Factorise a sparse (N, C) matrix: its best rank-p approximation is U S V.

    Args:
        matrix: CSR.
        dimensions: p, if the matrix has as many rows and columns.
        seed: of the randomised SVD, and of the rows that are empty.

    Returns:
        (N, p) float32, the rows U sqrt(S); empty rows are filled by `place_unseen`.

    Raises:
        UserError: all rows are empty.
    """
    from sklearn.utils.extmath import randomized_svd

    seen = np.flatnonzero(np.diff(matrix.indptr))
    if not len(seen):
        raise UserError("no two tokens stand together more often than by chance; give shards with more text")
    dense = matrix[seen]
    width = min(dimensions, *dense.shape)
    get_logger().info(f"co-occurrence: singular vectors of {dense.shape[0]:,} x {dense.shape[1]:,}, rank {width}")
    left, singular, _ = randomized_svd(dense, width, n_oversamples=16, n_iter=3, random_state=seed)
    vectors = np.empty((matrix.shape[0], width), dtype=np.float32)
    vectors[seen] = left * np.sqrt(singular)
    place_unseen(vectors, seen, seed)
    return vectors


def place_unseen(vectors: np.ndarray, seen: np.ndarray, seed: int) -> None:
    """Fill each row that is not in `seen` with a seen row and a short step away from it, both keyed by (seed, id).

    Args:
        vectors: (N, p), changed in place.
        seen: ids of the rows that are filled.
        seed: of the draws.
    """
    num_tokens, width = vectors.shape
    unseen = np.setdiff1d(np.arange(num_tokens), seen)
    spread = np.sqrt(np.square(vectors[seen] - vectors[seen].mean(axis=0)).sum(axis=1).mean())
    words = 1 + -(-width // 64)  # one draws the token, the others hold the signs
    keys = unseen.astype(np.uint64)[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
    noise = mix64(mix64(keys + np.uint64(derive_key(seed, 0x756E7365))))
    drawn = seen[(noise[:, 0] % np.uint64(len(seen))).astype(np.int64)]
    bits = np.unpackbits(noise[:, 1:].astype("<u8").view(np.uint8), axis=1)[:, :width]
    signs = 2 * bits.astype(np.float32) - 1
    vectors[unseen] = vectors[drawn] + np.float32(UNSEEN_STEP * spread / np.sqrt(width)) * signs
