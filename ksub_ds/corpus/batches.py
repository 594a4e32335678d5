"""Batches for training and for the held-out measure, as numpy arrays.

    data = TrainingBatches(dataset, global_batch_size=256, alpha=1.0, seed=0, mlm_probability=0.15)
    batch = data.batch(step, start, stop)   # rows start..stop of the global batch of optimizer step `step`

A rank asks for its own slice; the slices of all ranks together are the same global batch on any
number of ranks.
"""

from collections.abc import Iterator

import numpy as np

from ksub_ds.corpus.masking import MaskingRule, mask_tokens, sequence_keys
from ksub_ds.corpus.sampling import Sampler
from ksub_ds.corpus.shards import ShardDataset

Batch = dict[str, np.ndarray]
_HELD_OUT_EPOCH = 2**62  # an epoch no training run reaches: held-out masks are never training masks


def masking_rule(dataset: ShardDataset, mlm_probability: float) -> MaskingRule:
    """The masking rule for the tokenizer that a data set was made with."""
    tokenizer = dataset.manifest["tokenizer"]
    return MaskingRule(mlm_probability, tokenizer["mask_id"], tuple(tokenizer["special_ids"]), tokenizer["vocab_size"])


def _masked_batch(dataset: ShardDataset, rows: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> Batch:
    input_ids, labels = mask_tokens(rows, keys, rule)
    batch = {"input_ids": input_ids, "labels": labels}
    pad_id = dataset.manifest["tokenizer"]["pad_id"]
    if (rows[:, -1] == pad_id).any():  # padding stands only at the end of a row
        batch["attention_mask"] = (rows != pad_id).astype(np.int64)
    return batch


class TrainingBatches:
    """Masked training batches; a batch is a pure function of the settings and the step.

    Args:
        dataset: opened shards.
        global_batch_size: sequences per optimizer step, over all ranks and micro-steps.
        alpha: language smoothing (sampling.py).
        seed: the recipe's seed.
        mlm_probability: share of tokens to predict.
    """

    def __init__(self, dataset: ShardDataset, global_batch_size: int, alpha: float, seed: int, mlm_probability: float):
        self._dataset, self._seed = dataset, seed
        self.global_batch_size = global_batch_size
        counts = {language: dataset.num_sequences("train", language) for language in dataset.languages}
        self.sampler = Sampler(counts, alpha, seed)
        self._rule = masking_rule(dataset, mlm_probability)

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of optimizer step `step` (from 0).

        Returns:
            input_ids and labels, (stop - start, T) int64; attention_mask too when a row holds padding.
        """
        epochs, draws, sequences = self.sampler.draws(step, self.global_batch_size)
        part = slice(start, stop)
        rows = self._dataset.gather("train", sequences[part])
        return _masked_batch(self._dataset, rows, sequence_keys(self._seed, epochs[part], draws[part]), self._rule)


class HeldOutBatches:
    """The held-out rows with fixed masks: the same numbers at every evaluation, in every run.

    Args:
        dataset: opened shards.
        sequences_per_language: how many rows a language gives, spread evenly over what it has.
        mlm_probability: share of tokens to predict.
        batch_size: rows a batch; a batch holds one language.
        seed: fixes the masks.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        sequences_per_language: int,
        mlm_probability: float,
        batch_size: int = 16,
        seed: int = 0,
    ):
        self._dataset, self._seed = dataset, seed
        self._rule = masking_rule(dataset, mlm_probability)
        self._plan: list[tuple[str, np.ndarray]] = []
        for language in dataset.languages:
            available = dataset.num_sequences("validation", language)
            taken = min(sequences_per_language, available)
            indices = np.arange(taken, dtype=np.int64) * available // max(taken, 1)
            self._plan += [(language, indices[first : first + batch_size]) for first in range(0, taken, batch_size)]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        """Pairs (language, batch) with batches as TrainingBatches gives them."""
        for language, indices in self._plan:
            rows = self._dataset.gather("validation", indices, language)
            keys = sequence_keys(self._seed, np.full(len(indices), _HELD_OUT_EPOCH), indices)
            yield language, _masked_batch(self._dataset, rows, keys, self._rule)
