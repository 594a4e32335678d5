"""How often tokens occur in shards.

N tokens, B rows of T tokens at a time
"""

from collections.abc import Iterable

import numpy as np

from ksub_ds.corpus.shards import ShardDataset

SAMPLE_ROWS = 20_000  # of a language: 10M tokens in rows of 512, counted in a tenth of a second


def token_frequency(blocks: Iterable[np.ndarray], num_tokens: int, special_ids: tuple[int, ...]) -> np.ndarray:
    """(N,) how often each token occurs in (B, T) blocks; special tokens count as absent."""
    frequency = np.zeros(num_tokens, dtype=np.int64)
    for ids in blocks:
        frequency += np.bincount(ids.reshape(-1), minlength=num_tokens)
    frequency[list(special_ids)] = 0
    return frequency


def log_frequency(dataset: ShardDataset, alpha: float) -> np.ndarray:
    """(N,) log frequency of each token in training as the sampler draws it; the most frequent token has 0.

    Counted on rows spread evenly over each language, at most SAMPLE_ROWS of them. Half an occurrence is added to each
    token, so that those not seen, special ones among them, have a finite value.

    Args:
        alpha: language smoothing (sampling.py).
    """
    tokenizer = dataset.manifest["tokenizer"]
    num_tokens, special_ids = tokenizer["vocab_size"], tuple(tokenizer["special_ids"])
    every = [dataset.rows("train", language) for language in dataset.languages]
    share = np.array([len(rows) for rows in every]) ** alpha
    drawn = np.zeros(num_tokens)
    for rows, weight in zip(every, share / share.sum(), strict=True):
        sample = rows[:: max(1, -(-len(rows) // SAMPLE_ROWS))]
        counts = token_frequency([sample], num_tokens, special_ids)
        drawn += weight * counts / max(1, counts.sum())
    half = 0.5 / sum(rows.size for rows in every)
    return np.log((drawn + half) / (drawn + half).max())
