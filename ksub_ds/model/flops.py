"""How many floating-point operations the training of a model needs for a token."""

import math
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ksub_ds.model.causal_lm import SubCausalLM

FORWARD_AND_BACKWARD = 3  # the gradients by inputs and by weights each cost what the forward pass does


def training_flops(model: Any, sequence_length: int, predicted_share: float) -> float:
    """Return the operations of one token's forward and backward pass, two for each multiplication with its addition.

    Counted are the matrix products that the model prescribes, whatever computes them: every linear layer of the
    network, attention's two products over the positions it may see (local layers see a window, causal ones what comes
    before), and at predicted positions the head's linear layers and the scores of all rows, the tables' and the
    dedicated ones. Not
    counted are the embeddings, norms and other elementwise work, and the loss's fold of these scores over the codes,
    whose cost depends on how it is done: 1 % of XLM-R-MEDIUM with 16,384 leaves. XLM-R-MEDIUM needs 176.4 million at
    512 positions.

    Args:
        model: a masked or causal language model of ours.
        sequence_length: positions of a row.
        predicted_share: of the positions.
    """
    encoder = model.base_model
    inner = {id(module) for module in encoder.modules()}
    head = [module for module in model.modules() if id(module) not in inner]
    scores = sum(rows * width for rows, width in _table_shapes(model.get_input_embeddings()))
    weights = _linear_weights(encoder.modules()) + predicted_share * (_linear_weights(head) + scores)
    causal = isinstance(model, SubCausalLM)
    return FORWARD_AND_BACKWARD * (2 * weights + _attention(encoder.config, sequence_length, causal))


def _linear_weights(modules: Any) -> int:
    return sum(
        module.nx * module.nf if isinstance(module, Conv1D) else module.in_features * module.out_features
        for module in modules
        if isinstance(module, Conv1D | torch.nn.Linear)
    )


def _table_shapes(embedding: Any) -> list[tuple[int, int]]:
    own = [] if embedding.dedicated is None else [(len(embedding.dedicated), embedding.embedding_dim)]
    return [*zip(embedding.table_sizes, embedding.widths, strict=True), *own]


def _attention(config: Any, length: int, causal: bool) -> float:
    """Return the operations of a token's scores and weighted sums in all layers, forward."""
    window = getattr(config, "sliding_window", None) or math.inf
    # Mistral's layers are all local, and it names no kinds.
    usual = "sliding_attention" if causal and window < length else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = sum(_positions_seen(length, math.inf if kind == "full_attention" else window, causal) for kind in kinds)
    return 4 * width * config.num_attention_heads * seen


def _positions_seen(length: int, window: float, causal: bool) -> float:
    """Return how many positions a layer's token sees, in the mean over a row.

    Args:
        length: of the row.
        window: how far a local layer sees: to each side, or, causal, back with the token itself.
        causal: only what comes before.
    """
    if not causal:
        return min(length, 2 * window + 1)
    near = min(length, window)
    return near * (length - (near - 1) / 2) / length
