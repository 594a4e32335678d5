"""torch.compile of the encoder, the part of a step that gains by it: one graph forward, one backward.

The loss and the head stay eager: dynamo breaks a graph where rows are chosen by position, and the fold of the codes has
kernels of its own. Shapes are static, so a training has one graph. A batch with padding runs eager: packed shards have
one padded row a language, and flash attention asks its mask for numbers, which breaks a graph. So does whatever is not
a training step (evaluation: other shapes, no dropout, no gradient).

A compiled encoder draws its dropout from torch's generator as the eager one does, so dropout stays a function of the
generator's seed. Of the backends "eager" and "aot_eager" draw the same numbers as without compiling, inductor others.
"""

from typing import Any

import torch
from torch import Tensor

BACKEND: Any = "inductor"  # a name or a function, as torch.compile takes it


def compile_encoder(model: Any) -> None:
    """Compile the network of a masked or causal language model in place: names of modules and weights stay.

    Nothing is compiled before the first training step, which raises where the graph breaks or the backend fails.

    Args:
        model: with its encoder in `base_model`.
    """
    torch.compiler.reset()  # else the graphs of a training before, in this process, count as recompilations
    encoder = model.base_model
    encoder.compile(backend=BACKEND, fullgraph=True, dynamic=False)
    compiled = encoder._compiled_call_impl

    def call(*arguments: Any, **keywords: Any) -> Any:
        trains = encoder.training and torch.is_grad_enabled() and keywords.get("attention_mask") is None
        return (compiled if trains else encoder._call_impl)(*arguments, **keywords)

    encoder._compiled_call_impl = call


def run_eager(model: Any) -> None:
    """Take `compile_encoder` back."""
    model.base_model._compiled_call_impl = None


def rehearse(model: Any, inputs: dict[str, Tensor]) -> None:
    """Compile the graph and the kernels of the loss now, forward and backward, by a batch that nothing is learnt from.

    Args:
        model: a masked or causal language model, in training mode.
        inputs: of a micro-batch, as the training gives them; shapes do not change after it.
    """
    loss = model(**inputs | {"attention_mask": None}, loss_reduction="sum").loss
    # The gradient of one weight alone, below the encoder: all of its backward pass runs, and nothing is accumulated.
    first = next(weight for weight in model.base_model.parameters() if weight.requires_grad)
    torch.autograd.grad(loss, first)
