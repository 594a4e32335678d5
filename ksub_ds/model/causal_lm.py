"""Causal language models over sub-embeddings: the head, and the families Llama, Mistral, Qwen3, Gemma 3 and GPT-2.

Every position predicts the next token, by the exact loss of softmax.py: training holds no N logits. Logits are made
where they are asked for: `generate` asks at the last position of each row. The families are grafted as the encoders
are in families.py.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    Cache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ksub_ds.codes.table import CodeTable
from ksub_ds.model.base import TokenPredictor
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.families import GraftedModel, add_task_models
from ksub_ds.model.softmax import factorized_cross_entropy
from ksub_ds.model.step_loss import per_item


class SubDecoder(nn.Module):
    """What a decoder has of its own: tables where it is not tied to the input embedding, a bias where there is one.

    Args:
        table: the codes, those of the input embedding.
        config: `tie_word_embeddings`, `decoder_bias`, `embedding_mixing` and `hidden_size` say what it has.
    """

    def __init__(self, table: CodeTable, config: Any):
        super().__init__()
        own = not config.tie_word_embeddings
        self.embedding = SubEmbedding(table, config.hidden_size, mixing=config.embedding_mixing) if own else None
        self.bias = nn.Parameter(torch.zeros(table.num_tokens)) if config.decoder_bias else None


class NoCache(Cache):
    """A cache that keeps nothing, for training on rows that are one sequence each.

    Without a cache and a mask transformers asks the device in every forward pass whether the rows are packed of several
    sequences, for which the host waits.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values as they are."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return that there are no earlier positions."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and the offset of the keys: those of the queries."""
        return query_length, 0


class SubCausalLM(TokenPredictor):
    """A causal language model whose loss is exact over all N tokens and never holds N logits."""

    _tp_plan: ClassVar[dict[str, str]] = {}  # transformers' plans name the decoder's matrix, which is not there
    _pp_plan: ClassVar[dict[str, Any]] = {}
    lm_head: SubDecoder

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # Label smoothing of transformers' Trainer shifts the labels of the classes that this list names.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.config_class.model_type] = cls.__name__

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        if getattr(config, "final_logit_softcapping", None) is not None:
            raise ValueError(
                "final_logit_softcapping: the tanh of a sum of table scores does not factor, so the exact sum over all "
                "tokens would need N logits a position; set it to None"
            )
        super().__init__(config, *args, **kwargs)

    def _replace_decoder(self, table: CodeTable) -> None:
        self.lm_head = SubDecoder(table, self.config)
        if self.lm_head.embedding is not None:
            self._init_weights(self.lm_head.embedding)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SubDecoder) and module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, SubEmbedding) and module is self.lm_head.embedding:
            # A folder of the bare model has only those of the input.
            init.copy_(module.codes, self.get_input_embeddings().codes)
            if module.dedicated is not None:
                init.copy_(module.dedicated, self.get_input_embeddings().dedicated)

    def decoder_embedding(self) -> SubEmbedding:
        """Return the sub-embedding of the decoder: the input's where they are tied, else its own."""
        own = self.lm_head.embedding
        return self.get_input_embeddings() if own is None else own

    def _decoder_bias_module(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_reduction: str = "mean",
        output_logits: bool = False,
        output_correct: bool = False,
        output_predictions: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute the loss of all labels, each predicted at the position before it; or logits without labels.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at padding, on either side.
            position_ids: (batch, length) positions. [counted]
            past_key_values: the cache of earlier positions.
            inputs_embeds: (batch, length, d) in place of `input_ids`.
            labels: (batch, length) token ids, mostly `input_ids` itself: shifted here, as by transformers; -100 where
                nothing is predicted. The logits are then None unless `output_logits`.
            use_cache: return a cache. [as the configuration says; not with labels]
            logits_to_keep: at which positions logits are made: the last so many, 0 for all, or positions.
            loss_reduction: "mean" over the labels, or "sum".
            output_logits: also return logits when there are labels. N is wide.
            output_correct: also return, as `correct`, how many labels are the most probable token.
            output_predictions: also return, as `predictions`, the most probable token at each place of a label,
                (batch, length), -100 elsewhere. Only with `labels`.
            return_dict: return a `CausalLMOutputWithPast` rather than a tuple. [as the configuration says]
            num_items_in_batch: labels of the whole optimizer step, which transformers' Trainer counts; the loss is the
                sum over this batch's divided by it. When evaluating, it also asks for `evaluation_output`.
            **kwargs: passed to the network.

        Returns:
            Loss, logits, cache, and the network's hidden states and attentions if asked for.

        Raises:
            ValueError: predictions without `labels`.
        """
        if num_items_in_batch is not None:
            loss_reduction = "sum"
        output_logits, output_predictions = self._asked_outputs(
            labels is not None, num_items_in_batch is not None, output_logits, output_predictions
        )
        plain_rows = all(each is None for each in (attention_mask, position_ids, past_key_values, use_cache))
        checkpointing = getattr(self.base_model, "gradient_checkpointing", False)  # it wants no cache
        if labels is not None and plain_rows and not checkpointing:
            past_key_values = NoCache()
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            return_dict=True,
            **kwargs,
        )
        states, layer, bias = outputs.last_hidden_state, self.decoder_embedding(), self.decoder_bias
        loss = logits = None
        extra: dict[str, Tensor] = {}
        if labels is not None:
            before, targets = states[:, :-1], labels[:, 1:]
            loss = factorized_cross_entropy(before, layer, targets, bias, reduction=loss_reduction)
            if num_items_in_batch is not None:
                loss = per_item(loss, num_items_in_batch, self.training)
            if output_correct or output_predictions:
                best = layer.most_probable(before.flatten(0, 1), bias)[1].view_as(targets)
                if output_correct:
                    extra["correct"] = (best == targets).sum()
                if output_predictions:
                    nothing = torch.full_like(labels, -100)
                    extra["predictions"] = torch.cat([nothing[:, :1], best.to(labels)], dim=1).where(
                        labels != -100, nothing
                    )
        if labels is None or output_logits:
            logits = layer.logits(_states_to_keep(states, logits_to_keep), bias)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=None if isinstance(past_key_values, NoCache) else outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        for name, value in extra.items():
            result[name] = value
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return result if use_dict else result.to_tuple()


def _states_to_keep(states: Tensor, keep: int | Tensor) -> Tensor:
    """Return the (batch, P, d) states of which logits are wanted, as transformers reads `logits_to_keep`.

    Args:
        states: (batch, length, d).
        keep: the last so many positions, 0 for all; or (P,) positions; or of each row its own, as (batch, P) numbers or
            as a (batch, length) mask, which gives (kept, d).
    """
    if isinstance(keep, int):
        return states[:, -keep:]  # -0 is 0
    if keep.ndim == 1:
        return states[:, keep]
    return states[keep] if keep.dtype == torch.bool else torch.take_along_dim(states, keep.unsqueeze(-1), dim=1)


# ---------------------------------------------------------------- Llama (SmolLM, TinyLlama)


@strict
class KSubLlamaConfig(LlamaConfig):
    """Llama's configuration and the sizes of the tables."""

    model_type = "ksub_llama"
    tie_word_embeddings: bool = True
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    decoder_bias: bool = False
    num_dedicated = 0


class KSubLlamaModel(GraftedModel, LlamaModel):
    """Llama's network."""

    config_class = KSubLlamaConfig
    place = "embed_tokens"


class KSubLlamaForCausalLM(SubCausalLM, GraftedModel, LlamaForCausalLM):
    """Llama with the exact loss of the next token."""

    config_class = KSubLlamaConfig
    place = "embed_tokens"
    bare_class = KSubLlamaModel


add_task_models(KSubLlamaModel)


# ---------------------------------------------------------------- Mistral


@strict
class KSubMistralConfig(MistralConfig):
    """Mistral's configuration and the sizes of the tables."""

    model_type = "ksub_mistral"
    tie_word_embeddings: bool = True
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    decoder_bias: bool = False
    num_dedicated = 0


class KSubMistralModel(GraftedModel, MistralModel):
    """Mistral's network."""

    config_class = KSubMistralConfig
    place = "embed_tokens"


class KSubMistralForCausalLM(SubCausalLM, GraftedModel, MistralForCausalLM):
    """Mistral with the exact loss of the next token."""

    config_class = KSubMistralConfig
    place = "embed_tokens"
    bare_class = KSubMistralModel


add_task_models(KSubMistralModel)


# ---------------------------------------------------------------- Qwen3


@strict
class KSubQwen3Config(Qwen3Config):
    """Qwen3's configuration and the sizes of the tables."""

    model_type = "ksub_qwen3"
    tie_word_embeddings: bool = True
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    decoder_bias: bool = False
    num_dedicated = 0


class KSubQwen3Model(GraftedModel, Qwen3Model):
    """Qwen3's network."""

    config_class = KSubQwen3Config
    place = "embed_tokens"


class KSubQwen3ForCausalLM(SubCausalLM, GraftedModel, Qwen3ForCausalLM):
    """Qwen3 with the exact loss of the next token."""

    config_class = KSubQwen3Config
    place = "embed_tokens"
    bare_class = KSubQwen3Model


add_task_models(KSubQwen3Model)


# ---------------------------------------------------------------- Gemma 3 (text)


@strict
class KSubGemma3TextConfig(Gemma3TextConfig):
    """Gemma 3's configuration and the sizes of the tables."""

    model_type = "ksub_gemma3_text"
    tie_word_embeddings: bool = True
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    decoder_bias: bool = False
    num_dedicated = 0


class ScaledSubEmbedding(SubEmbedding):
    """A sub-embedding whose vectors are scaled at the input, and not in the decoder.

    Attributes:
        scale: rounded to the type of the vectors, as transformers does.
    """

    scale: float

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (...) token ids and scale them: (..., d)."""
        embedded = super().forward(ids)
        return embedded * torch.tensor(self.scale, dtype=embedded.dtype, device="cpu")


class GraftedGemma3Text(GraftedModel):
    """Base class of our Gemma 3 models: the input is scaled by sqrt(d)."""

    config_class = KSubGemma3TextConfig
    place = "embed_tokens"

    def _new_embedding(self, plain: Any, table: CodeTable, padding: int | None) -> SubEmbedding:
        layer = super()._new_embedding(plain, table, padding)
        layer.__class__ = ScaledSubEmbedding
        layer.scale = plain.scalar_embed_scale
        return layer


class KSubGemma3TextModel(GraftedGemma3Text, Gemma3TextModel):
    """Gemma 3's network."""


class KSubGemma3TextForCausalLM(SubCausalLM, GraftedGemma3Text, Gemma3ForCausalLM):
    """Gemma 3 with the exact loss of the next token."""

    bare_class = KSubGemma3TextModel


add_task_models(KSubGemma3TextModel)


# ---------------------------------------------------------------- GPT-2


@strict
class KSubGPT2Config(GPT2Config):
    """GPT-2's configuration and the sizes of the tables."""

    model_type = "ksub_gpt2"
    tie_word_embeddings: bool = True
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    decoder_bias: bool = False
    num_dedicated = 0


class KSubGPT2Model(GraftedModel, GPT2Model):
    """GPT-2's network."""

    config_class = KSubGPT2Config
    place = "wte"


class KSubGPT2ForCausalLM(SubCausalLM, GraftedModel, GPT2LMHeadModel):
    """GPT-2 with the exact loss of the next token."""

    config_class = KSubGPT2Config
    place = "wte"
    bare_class = KSubGPT2Model


add_task_models(KSubGPT2Model)
