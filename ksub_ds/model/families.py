"""Other encoder families over sub-embeddings: BERT, ELECTRA, DistilBERT and ModernBERT; the task heads of all families.

transformers' own class builds everything with a vocabulary of a few tokens; then our embedding takes the place of
its word embedding, and the decoder is removed. RoBERTa, XLM-R and CamemBERT are one network and have their classes in
roberta.py. Each family has a model type of its own, so that its folder is never taken for a plain one.

Heads that predict tokens are written out. The others are transformers' own, and `add_task_models` makes their classes:
KSubBertForTokenClassification is found here although no line defines it.
"""

import sys
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
)
from transformers.models.modernbert.modeling_modernbert import ModernBertEmbeddings

from ksub_ds.codes.table import CodeTable
from ksub_ds.model.base import SubEmbeddingModel, with_table
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.masked_lm import SubMaskedLM
from ksub_ds.model.sequence_length import first_position
from ksub_ds.model.step_loss import add_up_over_batches

# Tasks whose head reads the last states and knows nothing of the vocabulary.
TASKS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
)


class GraftedModel(SubEmbeddingModel):
    """transformers' class of a family, built small and given a sub-embedding.

    Args:
        config: `config.vocab_size` must be the table's number of tokens.
        table: the codes; None only when transformers loads a saved folder.
        keywords: further arguments of transformers' class, such as `add_pooling_layer`.
    """

    bare_class: ClassVar[type | None] = None  # our class of the encoder inside; None: this is it
    place: ClassVar[str] = "embeddings.word_embeddings"

    def __init__(self, config: Any, table: CodeTable | None = None, **keywords: Any):
        config, table = with_table(config, table)
        padding = config.pad_token_id
        if padding is not None and not first_position(config):  # positions that are counted from it would shift
            config.pad_token_id = min(max(padding, 0), 1)  # 151,643 would build as many rows
        config.vocab_size = (config.pad_token_id or 0) + 1
        ours = type(config)
        config.__class__ = ours.__base__  # some heads ask AutoModel for the encoder; ours cannot be built so
        super().__init__(config, **keywords)
        config.__class__ = ours
        config.vocab_size, config.pad_token_id = table.num_tokens, padding
        if self.can_generate():
            self.generation_config.pad_token_id = padding
        encoder = self
        if self.bare_class is not None:
            encoder = self.base_model
            encoder.__class__ = self.bare_class  # it was built as the plain class, and differs in methods only
            with torch.device("meta"):
                self.bare_class(config, table)  # a first building tells transformers what the class can record
        plain = encoder.get_submodule(self.place)
        encoder.set_submodule(self.place, self._new_embedding(plain, table, padding))
        for module in (self, encoder):
            module.__dict__.pop("vocab_size", None)  # that of the first building; the configuration has N
        self._replace_decoder(table)

    def _new_embedding(self, plain: Any, table: CodeTable, padding: int | None) -> SubEmbedding:
        """Make what takes the place of the plain embedding."""
        padding = None if plain.padding_idx is None else padding
        layer = SubEmbedding(table, plain.embedding_dim, padding, mixing=self.config.embedding_mixing)
        with torch.no_grad():
            for each in layer.tables:  # drawn with BERT's 0.02
                each *= self.config.initializer_range / 0.02
        return layer

    def _replace_decoder(self, table: CodeTable) -> None:
        """Replace the decoder, in models that predict tokens."""


def add_task_models(bare: type[SubEmbeddingModel]) -> None:
    """Add our classes of a family for the TASKS that transformers has them for, beside that of the bare network.

    Beside KSubBertModel: KSubBertForSequenceClassification, KSubBertForTokenClassification and so on.

    Args:
        bare: our class of the bare network.
    """
    family = bare.__name__.removesuffix("Model")
    ours = [base for base in bare.__bases__ if issubclass(base, SubEmbeddingModel)]
    bases = ours if issubclass(bare, GraftedModel) else [GraftedModel, *ours]
    for task in TASKS:
        plain = task._model_mapping.get(bare.config_class.__base__, None)
        if plain is None:
            continue
        name = family + task.__name__.removeprefix("AutoModel")
        body = {
            "__module__": bare.__module__,
            "__doc__": f"transformers' {plain.__name__} over sub-embeddings.",
            "config_class": bare.config_class,
            "bare_class": bare,
            "place": getattr(bare, "place", GraftedModel.place),
            "forward": add_up_over_batches(plain.forward),
        }
        setattr(sys.modules[bare.__module__], name, type(name, (*bases, plain), body))


class TokenBias(nn.Module):
    """A decoder without its matrix, which is the embedding: one bias per token."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_tokens))


# ---------------------------------------------------------------- BERT


@strict
class KSubBertConfig(BertConfig):
    """BERT's configuration and the sizes of the tables."""

    model_type = "ksub_bert"
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    num_dedicated = 0


class KSubBertModel(GraftedModel, BertModel):
    """BERT's encoder."""

    config_class = KSubBertConfig


class KSubBertForMaskedLM(SubMaskedLM, GraftedModel, BertForMaskedLM):
    """BERT with the exact masked-token loss."""

    config_class = KSubBertConfig
    bare_class = KSubBertModel

    def _replace_decoder(self, table: CodeTable) -> None:
        self.cls.predictions.decoder = None
        self.cls.predictions.bias = nn.Parameter(torch.zeros(table.num_tokens))

    def _decoder_input(self, states: Tensor) -> Tensor:
        return self.cls.predictions.transform(states)

    def _decoder_bias_module(self) -> nn.Module:
        return self.cls.predictions


add_task_models(KSubBertModel)


# ---------------------------------------------------------------- ELECTRA (the generator's head)


@strict
class KSubElectraConfig(ElectraConfig):
    """ELECTRA's configuration and the sizes of the tables; d is its embedding_size."""

    model_type = "ksub_electra"
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    num_dedicated = 0


class KSubElectraModel(GraftedModel, ElectraModel):
    """ELECTRA's encoder."""

    config_class = KSubElectraConfig


class KSubElectraForMaskedLM(SubMaskedLM, GraftedModel, ElectraForMaskedLM):
    """ELECTRA's generator with the exact masked-token loss."""

    config_class = KSubElectraConfig
    bare_class = KSubElectraModel

    def _replace_decoder(self, table: CodeTable) -> None:
        self.generator_lm_head = TokenBias(table.num_tokens)

    def _decoder_input(self, states: Tensor) -> Tensor:
        return self.generator_predictions(states)

    def _decoder_bias_module(self) -> nn.Module:
        return self.generator_lm_head


add_task_models(KSubElectraModel)


# ---------------------------------------------------------------- DistilBERT


@strict
class KSubDistilBertConfig(DistilBertConfig):
    """DistilBERT's configuration and the sizes of the tables."""

    model_type = "ksub_distilbert"
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    num_dedicated = 0


class KSubDistilBertModel(GraftedModel, DistilBertModel):
    """DistilBERT's encoder."""

    config_class = KSubDistilBertConfig


class KSubDistilBertForMaskedLM(SubMaskedLM, GraftedModel, DistilBertForMaskedLM):
    """DistilBERT with the exact masked-token loss."""

    config_class = KSubDistilBertConfig
    bare_class = KSubDistilBertModel

    def _replace_decoder(self, table: CodeTable) -> None:
        self.vocab_projector = TokenBias(table.num_tokens)

    def _decoder_input(self, states: Tensor) -> Tensor:
        return self.vocab_layer_norm(self.activation(self.vocab_transform(states)))

    def _decoder_bias_module(self) -> nn.Module:
        return self.vocab_projector


add_task_models(KSubDistilBertModel)


# ---------------------------------------------------------------- ModernBERT


@strict
class KSubModernBertConfig(ModernBertConfig):
    """ModernBERT's configuration and the sizes of the tables."""

    model_type = "ksub_modernbert"
    table_sizes: list[int] | tuple[int, ...] | None = None
    embedding_mixing: bool = False
    num_dedicated = 0


class GraftedModernBert(GraftedModel):
    """Base class of our ModernBERT models: initial values for an embedding and a decoder without `weight`."""

    config_class = KSubModernBertConfig
    place = "embeddings.tok_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        grafted = isinstance(module, ModernBertEmbeddings) and isinstance(module.tok_embeddings, SubEmbedding)
        if not grafted and not (isinstance(module, SubMaskedLM) and isinstance(module.decoder, TokenBias)):
            super()._init_weights(module)


class KSubModernBertModel(GraftedModernBert, ModernBertModel):
    """ModernBERT's encoder."""


class KSubModernBertForMaskedLM(SubMaskedLM, GraftedModernBert, ModernBertForMaskedLM):
    """ModernBERT with the exact masked-token loss."""

    bare_class = KSubModernBertModel
    decoder: nn.Module

    def _replace_decoder(self, table: CodeTable) -> None:
        self.decoder = TokenBias(table.num_tokens)
        if not self.config.decoder_bias:
            self.decoder.bias = None

    def _decoder_input(self, states: Tensor) -> Tensor:
        return self.head(states)

    def _decoder_bias_module(self) -> nn.Module:
        return self.decoder


add_task_models(KSubModernBertModel)
