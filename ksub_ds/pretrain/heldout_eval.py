"""Held-out loss and masked accuracy per language, and per pair of languages, with masks that never change."""

import itertools
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.languages import LANGUAGE_PAIR
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.pretrain.prefetch import model_inputs, to_tensors


def held_out_languages(dataset: ShardDataset, pairs: bool = False) -> list[str]:
    """Return the languages that have a held-out part.

    Args:
        dataset: the shards.
        pairs: of the pairs of languages those too.
    """
    names = [*dataset.languages, *(dataset.pairs if pairs else [])]
    return [name for name in names if dataset.num_sequences("validation", name) > 0]


def evaluate(model: Any, held_out: HeldOutBatches, languages: list[str]) -> dict[str, Any]:
    """Evaluate on the held-out part; every rank does its share, and all get the whole result.

    The sums stay on the device until all batches are done, so a GPU computes without a pause.

    Args:
        model: a masked language model with `score_masked`.
        held_out: the batches, the same on every rank.
        languages: all languages and pairs `held_out` may name.

    Returns:
        {"loss", "masked_accuracy", "languages": {language: {"loss", "masked_accuracy", "count"}}}: nats
        and accuracy per masked token; over all languages each token counts the same. With pairs also "pairs", alike:
        they count in the whole only where there is no language.
    """
    import torch

    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()
    padded_for = None if device.type == "cpu" else held_out.rule.mlm_probability
    sums = torch.zeros(len(languages), 3, dtype=torch.float64, device=device)  # loss, correct, count
    was_training = model.training
    model.eval()
    batches = iter(held_out)
    while turn := list(itertools.islice(batches, world_size)):
        # A rank without a batch in the last turn computes one too: under ZeRO 3 the others need its shards.
        language, batch = turn[min(rank, len(turn) - 1)]
        totals = model.score_masked(**to_tensors(model_inputs(batch, padded_for), device))
        if rank < len(turn):
            sums[languages.index(language)] += totals
    model.train(was_training)

    flat = distributed.all_reduce_sum(sums.flatten().tolist())
    rows = {language: flat[3 * i : 3 * i + 3] for i, language in enumerate(languages)}
    scores = {language: _scores(*row) for language, row in rows.items() if row[2] > 0}
    pairs = {name: scores.pop(name) for name in list(scores) if LANGUAGE_PAIR.fullmatch(name)}
    counted = [row for name, row in rows.items() if name in (scores or pairs)] or [[0.0] * 3]
    total = _scores(*(sum(column) for column in zip(*counted, strict=True)))
    result = {"loss": total["loss"], "masked_accuracy": total["masked_accuracy"], "languages": scores}
    return result | ({"pairs": pairs} if pairs else {})


def _scores(loss: float, correct: float, count: float) -> dict[str, float]:
    return {"loss": loss / max(count, 1), "masked_accuracy": correct / max(count, 1), "count": int(count)}
