"""Predictions of a model for tokenised rows: batches of like length, in one pass over everything given."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ksub_ds.common.logging import Progress
from ksub_ds.evaluate.finetune.encoding import Encoded
from ksub_ds.pretrain.prefetch import to_tensors

# Merged docstring, to be folded in:
# """Which rows make a batch: rows of about one length together, so that next to nothing is padded.
#
# Training batches have a fixed number of rows, and their order is a function of (seed, epoch) alone: rows are
# shuffled, sorted by length inside windows of many batches, cut, and the batches shuffled again. Which rows meet in a
# batch stays random up to their length.
# """


WINDOW_BATCHES = 64  # batches sorted together


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: every row once.

    Args:
        lengths: (n,) tokens of each row.

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
    """How many batches `training_batches` makes of `count` rows."""
    return -(-count // batch_size)


def scoring_batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Batches of about `tokens` tokens, longest rows first (so memory runs out at once or never); every row once."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


TOKENS_ON_CPU, TOKENS_ON_GPU = 4_096, 65_536  # a batch; on a CPU its states should stay in the cache


def predict(
    model: Any,
    encoded: Encoded,
    precision: str = "fp32",
    check: Callable[[], None] = lambda: None,
    what: str = "",
) -> np.ndarray:
    """Logits of every row, (n, classes) float32, in the order of the rows.

    Args:
        model: a sequence classification model; its mode is left as it was.
        check: called between batches; may raise to give up.
        what: named in the progress; nothing is shown without it.
    """
    import torch

    device = next(model.parameters()).device
    tokens = TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_GPU
    logits: np.ndarray | None = None
    was_training = model.training
    model.eval()
    progress = Progress(len(encoded), "rows", what) if what else None
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for rows in scoring_batches(encoded.lengths(), tokens):
            part = model(**to_tensors(encoded.batch(rows), device)).logits.float().cpu().numpy()
            if logits is None:
                logits = np.empty((len(encoded), part.shape[1]), np.float32)
            logits[rows] = part
            check()
            if progress:
                progress.advance(len(rows))
    if progress:
        progress.__exit__(None, None, None)
    model.train(was_training)
    assert logits is not None
    return logits
