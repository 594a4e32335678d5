"""Batches for training and for held-out evaluation, as numpy arrays.

    data = TrainingBatches(dataset, global_batch_size=256, alpha=1.0, seed=0, mlm_probability=0.15)
    batch = data.batch(step, start, stop)   # rows start..stop of the global batch of optimizer step `step`

A rank takes its own slice; the slices of all ranks together are the same global batch on any number of ranks.

**Sampling.** Which sequence is where is a pure function of (seed, step). Position g = step x global batch size + i
counts samples since the beginning of training; the epoch is g // epoch_size and the index in the epoch g % epoch_size.
A keyed permutation maps the index to a slot, and slots belong to languages. Each language goes through its own
sequences in passes, shuffled anew for each pass. So any step is computed directly (resuming costs nothing), the
number of ranks does not matter, and nothing is stored.

**Language smoothing** (Conneau & Lample 2019, section 3.1): language l gets a share of the epoch proportional to
n_l ** alpha. With alpha = 1, the paper's, every sequence occurs exactly once in each epoch. With alpha < 1 small
languages are repeated evenly (no sequence a second time more often than another), and large ones continue in the next
epoch where they stopped.

**Translation language modelling** (section 3.3 there): with a share s of `pairs`, rows of pairs of languages are mixed
in. Of the first g samples since the beginning floor(s g) are such rows, so every step has its share to within one row.
Pairs have an order of their own, sampled as the languages are; both sides are masked, as any row is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.masking import MaskingRule, derive_key, mask_tokens, mix64, next_tokens, sequence_keys
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.shards.packing import Packing, pair_positions

Batch = dict[str, np.ndarray]
_ROUNDS = 8
_HELD_OUT_EPOCH = 2**62  # no training run reaches this epoch: held-out masks are never training masks
_PAIRS = 0x7061697273  # sets the keys of pairs apart from those of languages
_SHARES = 10**6  # a share of pairs is a multiple of its inverse, so that counting is exact
_BLOCK = 1 << 15  # samples computed at once; only speed depends on it


def permute(values: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of range(size) elementwise, without storing it.

    A Feistel network on Z_a x Z_b with a * b >= size, a and b near its root (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains", method 3): results outside the range go through it again.

    Args:
        values: (n,) integers, each in [0, its size).
        size: (n,) sizes.
        keys: (n,) uint64; equal keys and sizes give the same permutation.

    Returns:
        (n,) int64, each in [0, its size).
    """
    values, size = values.astype(np.int64), size.astype(np.int64)
    a = np.ceil(np.sqrt(size)).astype(np.int64)
    b = -(-size // a)
    result = np.empty_like(values)
    todo = np.arange(len(values))
    while todo.size:
        left, right = np.divmod(values, b)
        for number in range(_ROUNDS):
            salt = keys + np.uint64(number << 32)
            if number % 2 == 0:
                left = (left + _noise(right, salt)) % a
            else:
                right = (right + _noise(left, salt)) % b
        values = left * b + right
        inside = values < size
        result[todo[inside]] = values[inside]
        outside = ~inside
        todo, values, size, keys = todo[outside], values[outside], size[outside], keys[outside]
        a, b = a[outside], b[outside]
    return result


def _noise(values: np.ndarray, salt: np.ndarray) -> np.ndarray:
    mixed = mix64(mix64(values.astype(np.uint64) + salt))
    return (mixed >> np.uint64(24)).astype(np.int64)  # 40 bits: the sum stays far from overflow


def language_quotas(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Share out an epoch's sum(counts) samples among the languages.

    Args:
        counts: (languages,) sequences of each.
        alpha: smoothing exponent.

    Returns:
        (languages,) int64 by largest remainders, at least one each; the sum is that of `counts`.
    """
    weights = counts.astype(np.float64) ** alpha
    exact = weights / weights.sum() * counts.sum()
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    while quotas.sum() > counts.sum():  # the minimum of one has made the sum too large
        quotas[np.argmax(quotas - exact * (quotas > 1))] -= 1
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    missing = int(counts.sum() - quotas.sum())
    quotas[order[:missing]] += 1
    return quotas


class Sampler:
    """The order of the sequences in training.

    Args:
        counts: sequences of each language; languages are numbered in sorted order.
        alpha: smoothing exponent, in (0, 1]; 1 = proportional to size.
        seed: the recipe's seed.

    Raises:
        UserError: no sequences, or alpha out of range.
    """

    def __init__(self, counts: dict[str, int], alpha: float, seed: int):
        if not 0 < alpha <= 1:
            raise UserError(f"alpha: {alpha} is not in (0, 1]; 1 samples languages in proportion to their size")
        self.languages = sorted(language for language, count in counts.items() if count > 0)
        if not self.languages:
            raise UserError("the training data holds no sequences; prepare shards with more text")
        self._counts = np.array([counts[language] for language in self.languages], dtype=np.int64)
        self._quotas = self._counts.copy() if alpha == 1 else language_quotas(self._counts, alpha)
        self._offsets = np.cumsum(self._counts) - self._counts
        self._slots = np.cumsum(self._quotas)
        self.epoch_size = int(self._quotas.sum())
        self._seed = seed
        self._language_keys = np.array(
            [derive_key(seed, 2, *language.encode()) for language in self.languages], dtype=np.uint64
        )
        self._block: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def samples(self, step: int, global_batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the samples of the global batch of one optimizer step.

        Args:
            step: of the optimizer, from 0.
            global_batch_size: samples of a step, over all ranks and micro-steps.

        Returns:
            (epoch, index in the epoch, sequence index over the concatenated sorted languages), each
            (global_batch_size,) int64. A batch may cross the edge of an epoch.
        """
        return self.samples_from(step * global_batch_size, global_batch_size)

    def samples_from(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return samples by their position since the beginning of training.

        Args:
            start: position of the first.
            count: how many, at least one.

        Returns:
            (epoch, index in the epoch, sequence index), as `samples`.
        """
        position = start + np.arange(count, dtype=np.int64)
        epoch, index = np.divmod(position, self.epoch_size)
        first, last = int(position[0]) // _BLOCK, int(position[-1]) // _BLOCK
        if first == last:
            return epoch, index, self._sequences(first)[position - first * _BLOCK]
        blocks = np.concatenate([self._sequences(block) for block in range(first, last + 1)])
        return epoch, index, blocks[position - first * _BLOCK]

    def _sequences(self, block: int) -> np.ndarray:
        """Return the sequence indices of one block of samples; blocks count from the beginning of training."""
        number, sequences = self._block
        if number != block:
            position = block * _BLOCK + np.arange(_BLOCK, dtype=np.int64)
            sequences = self._compute(*np.divmod(position, self.epoch_size))
            self._block = block, sequences
        return sequences

    def _compute(self, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the sequence index of each sample, (n,) int64."""
        first = int(epoch[0])
        epoch_keys = [derive_key(self._seed, 1, number) for number in range(first, int(epoch[-1]) + 1)]
        keys = np.array(epoch_keys, dtype=np.uint64)[epoch - first]
        slot = permute(index, np.full_like(index, self.epoch_size), keys)
        language = np.searchsorted(self._slots, slot, side="right")
        quota, count = self._quotas[language], self._counts[language]
        earlier = epoch * quota + slot - (self._slots[language] - quota)  # samples of this language before this one
        number, order = np.divmod(earlier, count)  # of the pass over the language, and the position in it
        keys = mix64(self._language_keys[language] + number.astype(np.uint64))
        return self._offsets[language] + permute(order, count, keys)


def masking_rule(dataset: ShardDataset, mlm_probability: float | None) -> MaskingRule:
    """Return the masking rule for the tokenizer that a data set was made with.

    Args:
        dataset: opened shards.
        mlm_probability: share of tokens to predict; None for a causal model.

    Raises:
        UserError: a rule that masks, and a tokenizer without a mask token.
    """
    tokenizer = dataset.manifest["tokenizer"]
    if mlm_probability is not None and tokenizer["mask_id"] is None:
        raise UserError(
            f"--data {dataset.folder}: its tokenizer has no mask token, so that only causal models can be trained on "
            "it: --objective clm, with --preset llama_...; or make shards with a tokenizer that has one"
        )
    return MaskingRule(mlm_probability, tokenizer["mask_id"], tuple(tokenizer["special_ids"]), tokenizer["vocab_size"])


def _labelled_batch(dataset: ShardDataset, rows: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> Batch:
    padding = _packing(dataset).padding(rows)
    input_ids, labels = next_tokens(rows, padding) if rule.is_causal else mask_tokens(rows, keys, rule)
    batch = {"input_ids": input_ids, "labels": labels}
    if padding.any():
        batch["attention_mask"] = (~padding).astype(np.int64)
    return batch


def _packing(dataset: ShardDataset) -> Packing:
    """Return the form of a data set's rows."""
    tokenizer = dataset.manifest["tokenizer"]
    return Packing(dataset.sequence_length, tokenizer["bos_id"], tokenizer["eos_id"], tokenizer["pad_id"])


@dataclass(frozen=True)
class PairSettings:
    """How rows of pairs take part.

    Attributes:
        share: of all rows, in [0, 1]; 0 for none.
        reset_positions: the positions of a translation start again where its sentence's start.
        first_position: the number that the model gives to the first position: RoBERTa counts from the padding's id + 1.
    """

    share: float = 0.0
    reset_positions: bool = True
    first_position: int = 0

    def before(self, position: int) -> int:
        """Return how many of the samples before a position since the beginning of training are pairs."""
        return position * round(self.share * _SHARES) // _SHARES

    @property
    def gives_positions(self) -> bool:
        """Whether batches have position_ids; those without are counted by the model."""
        return self.share > 0 and self.reset_positions


NO_PAIRS = PairSettings()


def _position_ids(dataset: ShardDataset, rows: np.ndarray, is_pair: np.ndarray, first_position: int) -> np.ndarray:
    """Return the positions of rows, (B, T) int64, as the model numbers them; padding has the one before the first."""
    packing = _packing(dataset)
    positions = np.where(packing.padding(rows), -1, np.arange(rows.shape[1], dtype=np.int64))
    positions[is_pair] = pair_positions(rows[is_pair], packing)
    return np.maximum(positions + first_position, 0)


class TrainingBatches:
    """Training batches, masked or causal; a batch is a pure function of the settings and the step.

    Args:
        dataset: opened shards.
        global_batch_size: sequences per optimizer step, over all ranks and micro-steps.
        alpha: exponent of language smoothing, in (0, 1].
        seed: the recipe's seed.
        mlm_probability: share of tokens to predict; None for a causal model, which predicts all.
        pairs: how rows of pairs take part.

    Attributes:
        rule: how tokens are masked, and how many the tokenizer has.
        sampler: of the languages; of the pairs where all rows are such.

    Raises:
        UserError: no sequences of a kind that takes part.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        global_batch_size: int,
        alpha: float,
        seed: int,
        mlm_probability: float | None,
        pairs: PairSettings = NO_PAIRS,
    ):
        self._dataset, self._pairs = dataset, pairs
        self.global_batch_size = global_batch_size
        self._seeds = (seed, derive_key(seed, _PAIRS))
        groups = (dataset.languages if pairs.share < 1 else [], dataset.pairs if pairs.share > 0 else [])
        counts = [{name: dataset.num_sequences("train", name) for name in group} for group in groups]
        if pairs.share > 0 and not any(counts[1].values()):
            raise UserError(f"{dataset.folder}: holds no pairs of languages; make some with --parallel")
        self._samplers = [
            Sampler(each, alpha, own) if takes_part else None
            for each, own, takes_part in zip(counts, self._seeds, (pairs.share < 1, pairs.share > 0), strict=True)
        ]
        self.sampler = next(sampler for sampler in self._samplers if sampler is not None)
        self.rule = masking_rule(dataset, mlm_probability)

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Return rows [start, stop) of the global batch of one optimizer step.

        Args:
            step: from 0.
            start: first row, of the global batch.
            stop: the row after the last one.

        Returns:
            input_ids and labels, (stop - start, T) int64; attention_mask too when a row has padding; position_ids where
            those of translations start again.
        """
        first = step * self.global_batch_size
        before = np.array([self._pairs.before(first + start + i) for i in range(stop - start + 1)], dtype=np.int64)
        is_pair = np.diff(before) > 0
        rows = np.empty((stop - start, self._dataset.sequence_length), dtype=np.int32)
        keys = np.empty(stop - start, dtype=np.uint64)
        starts = (first + start - int(before[0]), int(before[0]))
        for number, (sampler, seed) in enumerate(zip(self._samplers, self._seeds, strict=True)):
            own = is_pair == bool(number)
            if sampler is not None and own.any():
                epochs, indices, sequences = sampler.samples_from(starts[number], int(own.sum()))
                rows[own] = self._dataset.gather("train", sequences, pairs=bool(number))
                keys[own] = sequence_keys(seed, epochs, indices)
        batch = _labelled_batch(self._dataset, rows, keys, self.rule)
        if self._pairs.gives_positions:
            batch["position_ids"] = _position_ids(self._dataset, rows, is_pair, self._pairs.first_position)
        return batch


class HeldOutBatches:
    """Held-out rows with fixed masks, the same at every evaluation and in every run.

    Args:
        dataset: opened shards.
        sequences_per_language: rows of each language, spread evenly over those it has.
        mlm_probability: share of tokens to predict; None for a causal model, which predicts all.
        batch_size: rows of a batch; a batch holds one language.
        seed: fixes the masks.
        pairs: how pairs take part; with any share, each pair of languages is evaluated as a language is.

    Attributes:
        rule: how tokens are masked.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        sequences_per_language: int,
        mlm_probability: float | None,
        batch_size: int = 16,
        seed: int = 0,
        pairs: PairSettings = NO_PAIRS,
    ):
        self._dataset, self._seed, self._pairs = dataset, seed, pairs
        self.rule = masking_rule(dataset, mlm_probability)
        self._plan: list[tuple[str, np.ndarray]] = []
        for language in [*dataset.languages, *(dataset.pairs if pairs.share > 0 else [])]:
            available = dataset.num_sequences("validation", language)
            taken = min(sequences_per_language, available)
            indices = np.arange(taken, dtype=np.int64) * available // max(taken, 1)
            self._plan += [(language, indices[first : first + batch_size]) for first in range(0, taken, batch_size)]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        """Yield (language or pair, batch), with batches as those of TrainingBatches."""
        for language, indices in self._plan:
            rows = self._dataset.gather("validation", indices, language)
            keys = sequence_keys(self._seed, np.full(len(indices), _HELD_OUT_EPOCH), indices)
            batch = _labelled_batch(self._dataset, rows, keys, self.rule)
            if self._pairs.gives_positions:
                is_pair = np.full(len(rows), language in self._dataset.pairs)
                batch["position_ids"] = _position_ids(self._dataset, rows, is_pair, self._pairs.first_position)
            yield language, batch
