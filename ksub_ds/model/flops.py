"""How many floating-point operations the training of a model needs for a token."""

import math
from typing import Any

import torch

FORWARD_AND_BACKWARD = 3  # the gradients by inputs and by weights each cost what the forward pass does


def training_flops(model: Any, sequence_length: int, masked_share: float) -> float:
    """Return the operations of one token's forward and backward pass, two for each multiplication with its addition.

    Counted are the matrix products that the model prescribes, whatever computes them: every linear layer of the
    encoder, attention's two products over the positions it may see (ModernBERT's local layers see a window), and at
    masked positions the head's linear layers and the scores of all rows, the tables' and the dedicated ones. Not
    counted are the embeddings, norms and other elementwise work, and the loss's fold of these scores over the codes,
    whose cost depends on how it is done: 1 % of XLM-R-MEDIUM with 16,384 leaves. XLM-R-MEDIUM needs 176.4 million at
    512 positions.

    Args:
        model: a masked language model of ours.
        sequence_length: positions of a row.
        masked_share: of the positions, that are predicted.
    """
    encoder = model.base_model
    inner = {id(module) for module in encoder.modules()}
    head = [module for module in model.modules() if id(module) not in inner]
    scores = sum(rows * width for rows, width in _table_shapes(model.get_input_embeddings()))
    weights = _linear_weights(encoder.modules()) + masked_share * (_linear_weights(head) + scores)
    return FORWARD_AND_BACKWARD * (2 * weights + _attention(encoder.config, sequence_length))


def _linear_weights(modules: Any) -> int:
    return sum(module.in_features * module.out_features for module in modules if isinstance(module, torch.nn.Linear))


def _table_shapes(embedding: Any) -> list[tuple[int, int]]:
    own = [] if embedding.dedicated is None else [(len(embedding.dedicated), embedding.embedding_dim)]
    return [*zip(embedding.table_sizes, embedding.widths, strict=True), *own]


def _attention(config: Any, length: int) -> float:
    """Return the operations of a token's scores and weighted sums in all layers, forward."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or math.inf
    seen = sum(length if kind == "full_attention" else min(length, 2 * window + 1) for kind in kinds)
    return 4 * config.hidden_size * seen
