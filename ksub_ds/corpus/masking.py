"""RoBERTa's dynamic masking, from a hash of each sample instead of a running generator.

15 % of the ordinary tokens are predicted; of these 80 % become `<mask>`, 10 % another ordinary token,
10 % are kept (Devlin et al. 2019, section 3.1; Liu et al. 2019, section 4.1). Special tokens are never
masked and never inserted. Every decision is a hash of (key of the sample, position), so that a sample
gets the same mask on any rank, in any worker and in any batch.

Legend: B sequences, T positions, P predicted positions.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

IGNORE = -100  # the label of a position that is not predicted
COUNT_MULTIPLE = 128  # padded numbers of predicted positions are multiples of it
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MASKED = np.uint64(round(0.8 * 2**32))  # 32 random bits below this: the position is masked;
_REPLACED = np.uint64(round(0.9 * 2**32))  # from here on: it gets another token; in between: it is kept


def mix64(values: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser, a good hash of a counter, elementwise and in place to a uint64 array."""
    shifted = values >> np.uint64(30)
    values ^= shifted
    values *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(values, np.uint64(27), out=shifted)
    values ^= shifted
    values *= np.uint64(0x94D049BB133111EB)
    np.right_shift(values, np.uint64(31), out=shifted)
    values ^= shifted
    return values


@functools.lru_cache(maxsize=1 << 12)
def derive_key(*parts: int) -> int:
    """Derive a 64-bit key from integers (for example seed, epoch), each of which changes all of its bits."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key += np.uint64((part + 1) * _GOLDEN & _MASK64)
        mix64(key)
    return int(key[0])


def sequence_keys(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the keys of B samples, different for every (seed, epoch, index in the epoch).

    Args:
        seed: of the run.
        epochs: (B,) integers.
        indices: (B,) integers.

    Returns:
        (B,) uint64.
    """
    keys = np.asarray(epochs).astype(np.uint64) * np.uint64(_GOLDEN)
    keys += np.uint64(derive_key(seed, 0x6D61736B))
    mix64(keys)
    keys += np.asarray(indices).astype(np.uint64) * np.uint64(_GOLDEN)
    return mix64(keys)


@dataclass(frozen=True)
class MaskingRule:
    """The probability of masking, and what masking needs to know of the tokenizer.

    Attributes:
        mlm_probability: share of the ordinary tokens to predict, in [0, 1]; None where nothing is masked, and every
            token is predicted from those before it.
        mask_id: id of `<mask>`; None where nothing is masked and there is none.
        special_ids: ids that are never masked and never inserted; sorted.
        vocab_size: N; random tokens are ordinary ids below it.
    """

    mlm_probability: float | None
    mask_id: int | None
    special_ids: tuple[int, ...]
    vocab_size: int

    @property
    def is_causal(self) -> bool:
        """Whether every token is predicted from those before it."""
        return self.mlm_probability is None


def mask_tokens(ids: np.ndarray, keys: np.ndarray, rule: MaskingRule) -> tuple[np.ndarray, np.ndarray]:
    """Mask a batch.

    Args:
        ids: (B, T) int32 token ids.
        keys: (B,) uint64 from `sequence_keys`.
        rule: probability and special ids; not a causal one.

    Returns:
        input_ids and labels, (B, T) int64; labels are IGNORE where nothing is predicted.
    """
    assert rule.mlm_probability is not None and rule.mask_id is not None, "a causal rule masks nothing"
    batch, length = ids.shape
    input_ids = ids.astype(np.int64)
    labels = np.full((batch, length), IGNORE, dtype=np.int64)
    flat_inputs, flat_labels = input_ids.reshape(-1), labels.reshape(-1)

    pairs = (length + 1) // 2  # one 64-bit hash serves two positions
    counters = np.arange(1, pairs + 1, dtype="<u8") * np.uint64(_GOLDEN)
    noise = mix64(keys[:, None] + counters).view("<u4")[:, :length]
    limit = round(rule.mlm_probability * 2**32)
    chosen = (noise <= np.uint32(limit - 1)).ravel().nonzero()[0] if limit else np.zeros(0, dtype=np.int64)
    ordinary = _is_ordinary(rule)[flat_inputs[chosen]]
    chosen = chosen[ordinary]  # (P,)
    tokens = flat_inputs[chosen]
    flat_labels[chosen] = tokens

    row = chosen // length
    position = chosen - row * length
    second = mix64(keys[row] + (position + pairs + 1).astype(np.uint64) * np.uint64(_GOLDEN))
    action = second >> np.uint64(32)
    substitute = np.where(action < _MASKED, rule.mask_id, tokens)
    random = np.flatnonzero(action >= _REPLACED)
    substitute[random] = _ordinary_tokens(second[random] & np.uint64(0xFFFFFFFF), rule)
    flat_inputs[chosen] = substitute
    return input_ids, labels


def masked_positions(labels: np.ndarray, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """List the predicted positions of a batch, so that no device has to look for them.

    Args:
        labels: (B, T), IGNORE where nothing is predicted.
        count: fill up to this number with position 0 and target IGNORE; where more are predicted, up to the next
            multiple of COUNT_MULTIPLE. None: as many as are predicted.

    Returns:
        (P,) int64 places in the flattened B x T, rising, and their (P,) int64 token ids.
    """
    flat = labels.reshape(-1)
    places = np.flatnonzero(flat != IGNORE)
    if count is None:
        return places, flat[places].astype(np.int64)
    size = count if len(places) <= count else _round_up(len(places))
    positions, targets = np.zeros(size, dtype=np.int64), np.full(size, IGNORE, dtype=np.int64)
    positions[: len(places)], targets[: len(places)] = places, flat[places]
    return positions, targets


def padded_count(tokens: int, mlm_probability: float) -> int:
    """Return a number of predicted positions that batches of so many tokens nearly never exceed.

    It is the mean of the binomial distribution plus four standard deviations, which 1 batch in 30,000 exceeds,
    rounded up to COUNT_MULTIPLE: all batches of a run then have one shape.
    """
    deviation = math.sqrt(tokens * mlm_probability * (1 - mlm_probability))
    return min(_round_up(math.ceil(tokens * mlm_probability + 4 * deviation)), _round_up(tokens))


def _round_up(count: int) -> int:
    return -(-count // COUNT_MULTIPLE) * COUNT_MULTIPLE


def next_tokens(ids: np.ndarray, padding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make the labels of a causal model, which shifts them itself: every token but the first of a row.

    Args:
        ids: (B, T) int32 token ids, padded at the end.
        padding: (B, T) bool, where they are; padding is not predicted.

    Returns:
        input_ids and labels, (B, T) int64; labels are IGNORE where nothing is predicted.
    """
    input_ids = ids.astype(np.int64)
    labels = np.where(padding, IGNORE, input_ids)
    labels[:, 0] = IGNORE
    return input_ids, labels


@functools.lru_cache(maxsize=4)
def _is_ordinary(rule: MaskingRule) -> np.ndarray:
    """Return (N,) bool, whether a token may be masked and inserted."""
    table = np.ones(rule.vocab_size, dtype=bool)
    table[list(rule.special_ids)] = False
    return table


def _ordinary_tokens(noise: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """Return ordinary token ids from 32-bit noise: scale to the number of ordinary ids, then skip the special ones."""
    tokens = (noise * np.uint64(rule.vocab_size - len(rule.special_ids)) >> np.uint64(32)).astype(np.int64)
    for special in sorted(rule.special_ids):
        tokens += tokens >= special
    return tokens
