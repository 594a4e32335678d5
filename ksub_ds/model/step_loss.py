"""Losses that add up over the batches of an optimizer step, for transformers' Trainer.

The Trainer counts the labels of all batches that it accumulates and passes the number to `forward` as
`num_items_in_batch`. A model that takes it must return the sum of its losses divided by that number: the sum over the
batches is then the mean of the step, however the step is cut into batches. transformers' own classes for masked tokens
of BERT and RoBERTa, and all for classification, take the number and return the mean of the batch: four batches give
four times the gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def per_item(total: Tensor, items: Tensor | int, training: bool) -> Tensor:
    """Divide a summed loss by the labels of the step.

    Args:
        total: the sum over one batch.
        items: labels of all batches of the step; from DataParallel one row per replica, with the same number.
        training: a step without any label then has loss 0 and no gradient, rather than NaN, which would end in the
            weights.
    """
    count = torch.as_tensor(items, device=total.device).flatten()[0]
    return total / (count.clamp(min=1) if training else count)


def add_up_over_batches(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the `forward` of a task's model, whose loss is a mean, take `num_items_in_batch`; its signature stays.

    Args:
        forward: of one of transformers' classes with a task's head.
    """

    @functools.wraps(forward)
    def scaled(self: Any, *args: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        labels = kwargs.get("labels")
        if num_items_in_batch is None or labels is None:
            return outputs
        name = 0 if isinstance(outputs, tuple) else "loss"
        count = (labels != -100).sum()
        total = torch.where(count > 0, outputs[name], 0.0) * count  # the mean over no row is NaN
        loss = per_item(total, num_items_in_batch, self.training)
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs["loss"] = loss
        return outputs

    return scaled
