"""torch.compile of the encoder, the part of a step that gains by it: one graph forward, one backward.

The loss and the head stay eager: dynamo breaks a graph where rows are chosen by position, and the fold of the codes has
kernels of its own. Shapes are static, so a training has two graphs, without and with an attention mask; whatever is not
a training step (evaluation: other shapes, no dropout, no gradient) runs eager and compiles nothing.

A compiled encoder draws its dropout from torch's generator as the eager one does, so dropout stays a function of the
generator's seed. Of the backends "eager" and "aot_eager" draw the same numbers as without compiling, inductor others.
"""

from typing import Any

import torch
from torch import Tensor

BACKEND: Any = "inductor"  # a name or a function, as torch.compile takes it


def compile_encoder(model: Any) -> None:
    """Compile the encoder of a masked language model in place: names of modules and weights stay.

    Nothing is compiled before the first training step, which raises where the graph breaks or the backend fails.

    Args:
        model: with its encoder in `base_model`.
    """
    torch.compiler.reset()  # else the graphs of a training before, in this process, count as recompilations
    encoder = model.base_model
    encoder.compile(backend=BACKEND, fullgraph=True, dynamic=False)
    compiled = encoder._compiled_call_impl

    def call(*arguments: Any, **keywords: Any) -> Any:
        trains = encoder.training and torch.is_grad_enabled()
        return (compiled if trains else encoder._call_impl)(*arguments, **keywords)

    encoder._compiled_call_impl = call


def run_eager(model: Any) -> None:
    """Take `compile_encoder` back."""
    model.base_model._compiled_call_impl = None


def rehearse(model: Any, input_ids: Tensor, masked: bool) -> None:
    """Compile one of the two graphs now, forward and backward, by a batch that nothing is learnt from.

    Args:
        model: a masked language model, in training mode.
        input_ids: (batch, length) ids of a micro-batch: shapes do not change after it.
        masked: with an attention mask.
    """
    labels = torch.full_like(input_ids, -100)
    labels[0, 0] = input_ids[0, 0]
    mask = torch.ones_like(input_ids) if masked else None
    loss = model(input_ids=input_ids, attention_mask=mask, labels=labels, loss_reduction="sum").loss
    # The gradient of one weight alone, below the encoder: all of its backward pass runs, and nothing is accumulated.
    first = next(weight for weight in model.base_model.parameters() if weight.requires_grad)
    torch.autograd.grad(loss, first)
