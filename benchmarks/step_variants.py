"""What step.py compares: for masked and for causal language models, how each variant is built and computes its loss.

The first two variants of an objective are the references, the others are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from loss import N, leaf_codes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaForMaskedLM

from ksub_ds import CodeTable, KSubRobertaConfig, KSubRobertaForMaskedLM, factorized_cross_entropy, positional_codes
from ksub_ds.codes.positional import plain_codes
from ksub_ds.model.causal_lm import KSubLlamaForCausalLM
from ksub_ds.model.presets import preset_config


@dataclass(frozen=True)
class Bounds:
    """What a variant of ours is to reach."""

    times_first: float
    """Faster than the first reference, at least."""
    times_second: float
    """Faster than the second reference, at least."""
    memory_saved: float
    """Memory of the first reference over its own, at least."""
    head_share: float
    """The head's part of the step, at most."""


@dataclass(frozen=True)
class Variant:
    """One way to make a training step.

    Attributes:
        build: makes the model.
        loss: of the model, token ids and labels, both (batch, length).
        head: of ours, the loss of the model's decoder alone: of states (rows, d) and targets (rows,).
        bounds: of ours.
    """

    build: Callable[[], Any]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    head: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    bounds: Bounds | None = None


@dataclass(frozen=True)
class Objective:
    """What is trained.

    Attributes:
        title: of the table.
        label: makes labels (batch, length) for token ids, -100 where nothing is predicted.
        targets: picks what is predicted out of such labels.
        predicted_share: of the positions.
        variants: by name, with the two references first.
    """

    title: str
    label: Callable[[Tensor, torch.Generator], Tensor]
    targets: Callable[[Tensor], Tensor]
    predicted_share: float
    variants: dict[str, Variant]


def fields_of(ours: Any, plain: type) -> dict[str, Any]:
    """Return those fields of our configuration that transformers' own has."""
    return {key: getattr(ours, key) for key in plain.__dataclass_fields__ if key != "model_type"}


def own_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss as the model does."""
    return model(input_ids=ids, labels=labels).loss


def own_head(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss of our decoder from the last hidden states."""
    hidden = model._decoder_input(states) if hasattr(model, "_decoder_input") else states
    return factorized_cross_entropy(hidden, model.get_input_embeddings(), targets, model.decoder_bias)


def positional() -> CodeTable:
    return positional_codes(N, 3)


# ---------------------------------------------------------------- masked: XLM-R-MEDIUM


def masked_lm() -> Objective:
    """Return the variants of a masked language model: 15 % of the positions are predicted."""

    def transformers_model() -> Any:
        return XLMRobertaForMaskedLM(XLMRobertaConfig(**fields_of(KSubRobertaConfig.xlmr_medium(), XLMRobertaConfig)))

    def dense_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        masked = labels != -100
        states = model.roberta(input_ids=ids).last_hidden_state[masked]
        return F.cross_entropy(model.lm_head(states).float(), labels[masked])

    def coded(codes: Callable[[], CodeTable]) -> Any:
        return KSubRobertaForMaskedLM(KSubRobertaConfig.xlmr_medium(), codes())

    share = 0.15
    bounds = Bounds(times_first=6.5, times_second=1.9, memory_saved=3.5, head_share=0.03)

    return Objective(
        "XLM-R-MEDIUM training step",
        lambda ids, generator: torch.where(torch.rand(ids.shape, generator=generator) < share, ids, -100),
        lambda labels: labels[labels != -100],
        share,
        {
            "transformers": Variant(transformers_model, own_loss),
            "masked dense": Variant(transformers_model, dense_loss),
            "positional": Variant(partial(coded, positional), own_loss, own_head, bounds),
            "leaves": Variant(partial(coded, leaf_codes), own_loss, own_head, bounds),
        },
    )


# ---------------------------------------------------------------- causal: Llama of the same size


def causal_lm(chunk: int | None) -> Objective:
    """Return the variants of a causal language model: every position but the last of a row predicts the next token.

    Args:
        chunk: rows at a time of `F.linear_cross_entropy`; None where torch does not have it: the second reference is
            then this project's dense loss in blocks (K = 1).
    """

    def dense() -> Any:
        ours = preset_config("llama_medium", vocab_size=N, use_cache=False)
        return LlamaForCausalLM(LlamaConfig(**fields_of(ours, LlamaConfig)))

    def coded(codes: Callable[[], CodeTable], bias: bool) -> Any:
        return KSubLlamaForCausalLM(preset_config("llama_medium", vocab_size=N, decoder_bias=bias), codes())

    def chunked_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        states = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(states, model.lm_head.weight, labels[:, 1:].flatten(), options=options)

    if chunk is None:
        second = {"dense in blocks": Variant(partial(coded, partial(plain_codes, N), False), own_loss)}
    else:
        second = {"linear cross entropy": Variant(dense, chunked_loss)}
    return Objective(
        "Training step of a causal model, Llama in XLM-R-MEDIUM's size",
        lambda ids, _: ids.clone(),
        lambda labels: labels[:, 1:].flatten(),
        1.0,
        {
            "transformers": Variant(dense, own_loss),
            **second,
            "positional": Variant(partial(coded, positional, False), own_loss, own_head, Bounds(6, 5, 5, 0.08)),
            "leaves + bias": Variant(partial(coded, leaf_codes, True), own_loss, own_head, Bounds(4.5, 4, 5, 0.08)),
        },
    )
