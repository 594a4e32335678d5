"""HuggingFace models over sub-embeddings: transformers' RoBERTa encoder, our embedding, our exact loss.

K = 1 is the plain baseline: the same classes, the same code path. The encoder, its attention (sdpa)
and the heads for other tasks are transformers' own; what is ours is the input embedding, and a masked
token head that is tied to it without an N x d matrix.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, RobertaModel, RobertaPreTrainedModel
from transformers import initialization as init
from transformers.models.roberta.modeling_roberta import (
    RobertaEmbeddings,
    RobertaEncoder,
    RobertaPooler,
)

from ksub_ds.codes.table import CodeTable
from ksub_ds.model.base import SubEmbeddingModel, with_table
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.families import add_task_models
from ksub_ds.model.masked_lm import SubMaskedLM


class KSubRobertaPreTrainedModel(SubEmbeddingModel, RobertaPreTrainedModel):
    """Base class of our RoBERTa models."""

    config_class = KSubRobertaConfig
    config: KSubRobertaConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KSubRobertaEmbeddings):
            positions = torch.arange(module.position_ids.shape[-1])
            init.copy_(module.position_ids, positions.expand((1, -1)))
            init.zeros_(module.token_type_ids)
        elif isinstance(module, KSubLMHead) and module.bias is not None:
            init.zeros_(module.bias)


class KSubRobertaEmbeddings(RobertaEmbeddings):
    """RoBERTa's embeddings (positions, types, norm, dropout) over a `SubEmbedding`."""

    def __init__(self, config: KSubRobertaConfig, table: CodeTable):
        small = copy.copy(config)
        small.vocab_size = config.pad_token_id + 1  # the parent allocates vocab_size x d, which we replace
        super().__init__(small)
        self.word_embeddings = SubEmbedding(
            table, config.hidden_size, padding_idx=config.pad_token_id, mixing=config.embedding_mixing
        )


class KSubRobertaModel(KSubRobertaPreTrainedModel, RobertaModel):
    """The bare encoder: (batch, length) ids -> (batch, length, d) states.

    Args:
        config: `config.vocab_size` must be the table's number of tokens.
        table: the codes; None only when transformers loads a saved folder.
        add_pooling_layer: as in transformers: whether the first state is pooled to an output too.
    """

    def __init__(self, config: KSubRobertaConfig, table: CodeTable | None = None, add_pooling_layer: bool = True):
        config, table = with_table(config, table)
        PreTrainedModel.__init__(self, config)  # not RobertaModel's, which would build an N x d embedding
        self.gradient_checkpointing = False
        self.embeddings = KSubRobertaEmbeddings(config, table)
        self.encoder = RobertaEncoder(config)
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
        self.post_init()


class KSubLMHead(nn.Module):
    """RoBERTa's masked-token head up to the decoder: dense, gelu, layer norm; and the decoder's bias."""

    def __init__(self, config: KSubRobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.decoder_bias else None

    def forward(self, states: Tensor) -> Tensor:
        """Turn (..., d) states into (..., d) decoder inputs."""
        return self.layer_norm(F.gelu(self.dense(states)))


class KSubRobertaForMaskedLM(SubMaskedLM, KSubRobertaPreTrainedModel):
    """Masked language model whose loss is exact over all N tokens and never holds N logits.

    Args:
        config: `config.vocab_size` must be the table's number of tokens.
        table: the codes; None only when transformers loads a saved folder.
    """

    def __init__(self, config: KSubRobertaConfig, table: CodeTable | None = None):
        config, table = with_table(config, table)
        super().__init__(config)
        self.roberta = KSubRobertaModel(config, table, add_pooling_layer=False)
        self.lm_head = KSubLMHead(config)
        self.post_init()

    def _decoder_input(self, states: Tensor) -> Tensor:
        return self.lm_head(states)

    def _decoder_bias_module(self) -> nn.Module:
        return self.lm_head


add_task_models(KSubRobertaModel)
