"""From a plain transformers model to the same model over sub-embeddings, and back.

    small = replace_embeddings(model, table)     fresh tables, every other weight kept
    plain = to_plain(small)                      the N x d matrix written out: any tool reads it

Fitting the tables to the old embedding is compression (ksub_ds/convert/compress.py).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CamembertConfig, PreTrainedModel, XLMRobertaConfig

from ksub_ds.codes.table import CodeTable
from ksub_ds.model.base import SubEmbeddingModel, TokenPredictor
from ksub_ds.model.causal_lm import SubCausalLM, SubDecoder
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.registration import FAMILIES, model_classes
from ksub_ds.model.roberta import KSubRobertaForMaskedLM, KSubRobertaModel


def _our_classes() -> dict[type, type[SubEmbeddingModel]]:
    """Return our class for each plain one. The first of several plain ones of ours is what `to_plain` makes."""
    networks = [(bare.config_class.__base__, bare) for bare in FAMILIES]
    networks += [(XLMRobertaConfig, KSubRobertaModel), (CamembertConfig, KSubRobertaModel)]
    return {
        plain: ours
        for config_class, bare in networks
        for auto, ours in model_classes(bare).items()
        if (plain := auto._model_mapping.get(config_class, None)) is not None
    }


CLASSES = _our_classes()
# Configuration fields that no plain model has.
OUR_FIELDS = ("table_sizes", "embedding_mixing", "num_dedicated", "embedding_input_only")
FILE_FIELDS = ("model_type", "transformers_version", "architectures", "auto_map", "_name_or_path", "dtype")


def replace_embeddings(model: PreTrainedModel, table: CodeTable, mixing: bool = False) -> SubEmbeddingModel:
    """Give a model fresh sub-embedding tables at both ends; every other weight is kept.

    Args:
        model: an encoder of the BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT or ModernBERT family: bare, for
            masked tokens, sequence or token classification, question answering or multiple choice; a Llama, Mistral,
            Qwen3, Gemma 3 (text) or GPT-2, bare, for causal language modelling or a task that transformers has it
            for; or one of ours, which gets other codes.
        table: codes of as many tokens as the model has, or fewer: later ids are then dropped.
        mixing: keep a fixed d x d matrix beside the tables (`SubEmbedding`).

    Returns:
        A new model of our class for the family; `save_pretrained` writes a folder that transformers' Auto classes
        open after `import ksub_ds`. The given model is not changed.

    Raises:
        ValueError: another kind of model, an encoder set up as a decoder, cross-attention, soft-capped logits,
            attention in both directions in a causal family, or more codes than tokens.
    """
    ours = _our_class(model)
    if getattr(model.config, "is_decoder", False) or getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} is set up as a decoder or with cross-attention (config.is_decoder, "
            "add_cross_attention); such models are not read"
        )
    if getattr(model.config, "use_bidirectional_attention", False):  # also halves the window in each copy of a Gemma 3
        raise ValueError(
            f"{type(model).__name__}: use_bidirectional_attention makes it no causal model; it is not read"
        )
    if table.num_tokens > model.config.vocab_size:
        raise ValueError(f"codes of {table.num_tokens:,} tokens for a model of {model.config.vocab_size:,}")
    fields = _fields(model.config, ours.config_class)
    config = ours.config_class(**fields, vocab_size=table.num_tokens, embedding_mixing=mixing)
    keywords = {"add_pooling_layer": model.pooler is not None} if hasattr(model, "pooler") else {}
    new = ours(config, table, **keywords)
    drop = _vocabulary_names(model)
    missing, unexpected = new.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name not in drop}, strict=False
    )
    wrong = sorted(set(missing) - _vocabulary_names(new)) + unexpected
    if wrong:
        raise ValueError(f"{type(model).__name__}: its weight {wrong[0]!r} does not fit {ours.__name__}")
    if isinstance(new, TokenPredictor) and new.decoder_bias is not None:
        with torch.no_grad():
            new.decoder_bias.copy_(_output_bias(model)[: table.num_tokens])
    _copy_generation_config(model, new)
    return _as_loaded(new, model)


def to_plain(model: SubEmbeddingModel, plain_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build the plain transformers model that computes the same: the N x d matrix written out, tied to its decoder.

    A decoder that is not tied gets the matrix of its own tables.

    Args:
        model: one of ours.
        plain_class: which plain class, where there are several. [RoBERTa's for RoBERTa, XLM-R and CamemBERT]

    Raises:
        ValueError: no plain class has this form (RoBERTa's head without a bias, a causal one with a bias).
    """
    candidates: list[Any] = [plain for plain, ours in CLASSES.items() if ours is type(model)]
    chosen = candidates[0] if plain_class is None else plain_class
    if chosen not in candidates:
        raise ValueError(f"{type(model).__name__} has no plain form {chosen.__name__}")
    if isinstance(model, KSubRobertaForMaskedLM) and model.decoder_bias is None:
        raise ValueError("a head without a bias per token (decoder_bias=False) has no plain form")
    if isinstance(model, SubCausalLM) and model.decoder_bias is not None:
        raise ValueError("a causal head with a bias per token (decoder_bias=True) has no plain form")
    config = chosen.config_class(**_fields(model.config, chosen.config_class), vocab_size=model.config.vocab_size)
    keywords = {"add_pooling_layer": model.pooler is not None} if hasattr(model, "pooler") else {}
    plain = chosen(config, **keywords)
    drop = _vocabulary_names(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in drop}
    weights[f"{model.embedding_name()}.weight"] = model.get_input_embeddings().dense_weight().detach()
    own = decoder_matrix(model)
    if own is not None:
        weights["lm_head.weight"] = own
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= _vocabulary_names(plain), (missing, unexpected)
    plain.tie_weights()
    decoder = plain.get_output_embeddings()
    if decoder is not None and decoder.bias is not None:
        with torch.no_grad():
            decoder.bias.copy_(model.decoder_bias)
    _copy_generation_config(model, plain)
    return _as_loaded(plain, model)


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """Return the (N, d) input embedding of a plain model or of one of ours, without a gradient.

    Raises:
        ValueError: the decoder of an encoder has another matrix, so one set of tables cannot stand for both.
    """
    layer = model.get_input_embeddings()
    if isinstance(layer, SubEmbedding):
        return layer.dense_weight().detach()
    decoder = model.get_output_embeddings()
    if decoder is not None and not _may_be_untied(model) and not torch.equal(decoder.weight, layer.weight):
        raise ValueError(
            f"{type(model).__name__}: its decoder is not tied to its input embedding; tie them first "
            "(tie_word_embeddings=True, then train)"
        )
    return layer.weight.detach()


def decoder_matrix(model: PreTrainedModel) -> Tensor | None:
    """Return the (N, d) matrix of a causal model's decoder where it is not tied to the input, without a gradient."""
    if isinstance(model, SubCausalLM):
        own = model.lm_head.embedding
        return None if own is None else own.dense_weight().detach()
    if not _may_be_untied(model) or model.config.tie_word_embeddings:
        return None
    return model.get_output_embeddings().weight.detach()


def _may_be_untied(model: PreTrainedModel) -> bool:
    """Return whether our class for a plain model can have tables for each of its two matrices."""
    return issubclass(CLASSES.get(type(model), SubEmbeddingModel), SubCausalLM)


def _our_class(model: PreTrainedModel) -> type[SubEmbeddingModel]:
    if isinstance(model, SubEmbeddingModel):
        return type(model)
    if type(model) not in CLASSES:
        known = ", ".join(plain.__name__ for plain, ours in CLASSES.items() if ours in FAMILIES)
        raise ValueError(
            f"{type(model).__name__} cannot be given sub-embeddings; known are {known}, bare or with a head for masked "
            "or next tokens, sequence or token classification, question answering or multiple choice"
        )
    return CLASSES[type(model)]


def _fields(config: Any, target: Any) -> dict[str, Any]:
    """Return the fields of a configuration that another class of the same family takes.

    Args:
        config: to read.
        target: the other class.
    """
    drop = {*OUR_FIELDS, *FILE_FIELDS, "vocab_size"}
    if "decoder_bias" not in target.__dataclass_fields__:
        drop.add("decoder_bias")
    return {key: value for key, value in copy.deepcopy(config).to_dict().items() if key not in drop}


def _as_loaded(new: PreTrainedModel, like: PreTrainedModel) -> Any:
    """Give a new model the mode, device and type of another.

    What no file stores, such as rotary frequencies, stays float32, as when transformers loads a model: rounded
    frequencies give wrong angles at late positions.
    """
    for value in new.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data = value.data.to(like.dtype)
    return new.to(device=like.device).train(like.training)


def _copy_generation_config(source: PreTrainedModel, target: PreTrainedModel) -> None:
    if source.can_generate() and target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors with a row per token (embedding, decoder, bias), and of our tables and codes."""
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    if isinstance(model, TokenPredictor):
        owners.append(model._decoder_bias_module())
    tensors = [each for owner in owners if owner is not None for each in _own_tensors(owner)]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, value in named if any(value is each for each in tensors)}


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Return all tensors of an embedding or decoder; of a head with layers of its own, only the bias."""
    if isinstance(module, SubEmbedding | SubDecoder | nn.Embedding | nn.Linear):
        return [*module.parameters(), *module.buffers()]
    return [] if module.bias is None else [module.bias]


def _output_bias(model: PreTrainedModel) -> Any:
    if isinstance(model, TokenPredictor):
        return model.decoder_bias
    return model.get_output_embeddings().bias
