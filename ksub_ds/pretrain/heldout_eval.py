"""Held-out loss and accuracy per language, and per pair of languages, with masks that never change.

Of a causal model also bits per byte of the text that the predicted tokens spell: unlike nats a token they can be
compared between vocabularies. A masked model gives no probability to a text, so it has none.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ksub_ds.common import distributed
from ksub_ds.common.languages import LANGUAGE_PAIR
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.masking import IGNORE
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import Tokenizer
from ksub_ds.corpus.tokenizers.spelling import token_bytes
from ksub_ds.pretrain.prefetch import model_inputs, to_tensors


def held_out_languages(dataset: ShardDataset, pairs: bool = False) -> list[str]:
    """Return the languages that have a held-out part.

    Args:
        dataset: the shards.
        pairs: of the pairs of languages those too.
    """
    names = [*dataset.languages, *(dataset.pairs if pairs else [])]
    return [name for name in names if dataset.num_sequences("validation", name) > 0]


def accuracy_key(causal: bool) -> str:
    """Return under which name metrics and scores have the share of tokens that were the most probable ones."""
    return "next_token_accuracy" if causal else "masked_accuracy"


def accuracy_key_of(scores: Mapping[str, Any]) -> str:
    """Return under which of these names some scores have it."""
    return accuracy_key(causal=accuracy_key(causal=True) in scores)


def evaluate(
    model: Any, held_out: HeldOutBatches, languages: list[str], tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Evaluate on the held-out part; every rank does its share, and all get the whole result.

    The sums stay on the device until all batches are done, so a GPU computes without a pause.

    Args:
        model: a language model with `score_labels`.
        held_out: the batches, the same on every rank.
        languages: all languages and pairs `held_out` may name.
        tokenizer: of the data; a causal model's bits per byte need it.

    Returns:
        {"loss", "masked_accuracy", "languages": {language: {"loss", "masked_accuracy", "count"}}}: nats
        and accuracy per predicted token; over all languages each token counts the same. With pairs also "pairs", alike:
        they count in the whole only where there is no language. A causal model has "next_token_accuracy" instead, and,
        where the tokenizer tells bytes, "bits_per_byte" and "bytes", with "unknown_tokens" where there are some: their
        bytes are not known and not counted.
    """
    import torch

    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    rule, fixed_shapes = held_out.rule, device.type != "cpu"
    sizes = token_bytes(tokenizer) if tokenizer is not None and rule.is_causal else None
    sums = torch.zeros(len(languages), 2, dtype=torch.float64, device=device)  # loss, correct
    counts = np.zeros((len(languages), 3))  # tokens, their bytes, unknown tokens
    was_training = model.training
    model.eval()
    batches = iter(held_out)
    while turn := list(itertools.islice(batches, world_size)):
        # A rank without a batch in the last turn computes one too: under ZeRO 3 the others need its shards.
        language, batch = turn[min(rank, len(turn) - 1)]
        totals = model.score_labels(**to_tensors(model_inputs(batch, rule, fixed_shapes), device))
        if rank < len(turn):
            place = languages.index(language)
            sums[place] += totals
            counts[place] += _count(batch["labels"], sizes, tokenizer)
    model.train(was_training)

    flat = distributed.all_reduce_sum([*sums.flatten().tolist(), *counts.flatten().tolist()])
    halves = (np.reshape(flat[: sums.numel()], sums.shape), np.reshape(flat[sums.numel() :], counts.shape))
    table = np.concatenate(halves, axis=1)
    rows = {language: row for language, row in zip(languages, table, strict=True) if row[2] > 0}
    scores = {language: _scores(row, rule.is_causal) for language, row in rows.items()}
    pairs = {name: scores.pop(name) for name in list(scores) if LANGUAGE_PAIR.fullmatch(name)}
    counted = [row for name, row in rows.items() if name in (scores or pairs)] or [np.zeros(5)]
    total = _scores(np.sum(counted, axis=0), rule.is_causal)
    del total["count"]
    return total | {"languages": scores} | ({"pairs": pairs} if pairs else {})


def _count(labels: np.ndarray, sizes: np.ndarray | None, tokenizer: Tokenizer | None) -> list[int]:
    """Return how many tokens a batch predicts, how many bytes they spell, and how many of them are the unknown one."""
    tokens = labels[labels != IGNORE]
    if sizes is None or tokenizer is None:
        return [tokens.size, 0, 0]
    # GPT-2's end token is named as the unknown one too.
    unknown = 0 if tokenizer.unk_id == tokenizer.eos_id else int((tokens == tokenizer.unk_id).sum())
    return [tokens.size, int(sizes[tokens].sum()), unknown]


def _scores(row: np.ndarray, causal: bool) -> dict[str, float]:
    """Return the scores that the sums of a row mean: loss, correct, tokens, bytes, unknown tokens."""
    loss, correct, count, num_bytes, unknown = row.tolist()
    scores = {"loss": loss / max(count, 1), accuracy_key(causal): correct / max(count, 1), "count": int(count)}
    if num_bytes:
        scores |= {"bits_per_byte": loss / (math.log(2) * num_bytes), "bytes": int(num_bytes)}
    return scores | ({"unknown_tokens": int(unknown)} if unknown else {})
