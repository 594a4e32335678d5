"""Predict the outputs of tokenised rows: rows of about one length together, in one pass over everything given."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ksub_ds.common.logging import Progress
from ksub_ds.evaluate.finetune.encoding import Encoded
from ksub_ds.pretrain.prefetch import to_tensors

TOKENS_ON_CPU, TOKENS_ON_GPU = 4_096, 65_536  # a batch; on a CPU its states should stay in the cache


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


def predict(
    model: Any,
    encoded: Encoded,
    precision: str = "fp32",
    check: Callable[[], None] = lambda: None,
    what: str = "",
) -> np.ndarray:
    """Return the logits of every row, (n, classes) float32, in the order of the rows.

    Args:
        model: a sequence classification model; its mode is left as it was.
        encoded: the rows.
        precision: of the forward pass, "fp32" or "bf16".
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
