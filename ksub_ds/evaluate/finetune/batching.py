"""Which rows make a batch: rows of about one length together, so that next to nothing is padded.

Training batches have a fixed number of rows, and their order is a function of (seed, epoch) alone: rows are
shuffled, sorted by length inside windows of many batches, cut, and the batches shuffled again. Which rows share a
batch stays random up to their length.
"""

from collections.abc import Iterator

import numpy as np

WINDOW_BATCHES = 64  # batches sorted together


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch: every row once.

    Args:
        lengths: (n,) tokens of each row.
        batch_size: rows of a batch.
        seed: of the order.
        epoch: from 0; each has an order of its own.

    Returns:
        Row numbers of each batch; all batches but one have `batch_size` rows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Return how many batches `training_batches` makes of `count` rows."""
    return -(-count // batch_size)


def scoring_batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yield batches of about `tokens` tokens, every row once.

    Args:
        lengths: (n,) tokens of each row.
        tokens: of a batch, padding included; one row may have more.

    Yields:
        Row numbers of a batch, those of the longest rows first, so memory runs out at once or never.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size
