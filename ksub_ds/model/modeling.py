"""HuggingFace models over sub-embeddings: transformers' RoBERTa encoder, our embedding, our exact loss.

K = 1 is the plain baseline: the same classes, the same code path. The encoder, its attention (sdpa)
and the classification head are transformers' own; what is ours is the input embedding, and a masked
token head that is tied to it without an N x d matrix.
"""

import copy
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, RobertaModel, RobertaPreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.roberta.modeling_roberta import (
    RobertaClassificationHead,
    RobertaEmbeddings,
    RobertaEncoder,
    RobertaForSequenceClassification,
    RobertaPooler,
)

from ksub_ds.codes.table import CodeTable
from ksub_ds.model import auto
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.softmax import factorized_cross_entropy, log_partition

# Stored beside our weights with a shape no model can take: RobertaForMaskedLM and its kin would else
# read our folder, find no embedding, and go on with a random one after a mere warning.
# (Who passes ignore_mismatched_sizes=True has asked for just that.)
GUARD = "embeddings.word_embeddings.weight"


class KSubRobertaPreTrainedModel(RobertaPreTrainedModel):
    """What all our models share: initial values, saving with the guard, loading with a check of the codes."""

    config_class = KSubRobertaConfig
    config: KSubRobertaConfig
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"embeddings\.word_embeddings\.weight$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SubEmbedding):
            for table in module.tables:
                init.normal_(table, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, KSubRobertaEmbeddings):
            positions = torch.arange(module.position_ids.shape[-1])
            init.copy_(module.position_ids, positions.expand((1, -1)))
            init.zeros_(module.token_type_ids)
        elif isinstance(module, KSubLMHead) and module.bias is not None:
            init.zeros_(module.bias)

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As transformers', with the codes among the weights and a guard against RoBERTa's own classes."""
        stored = dict(self.state_dict() if state_dict is None else state_dict)
        prefix = "" if isinstance(self, KSubRobertaModel) else "roberta."
        stored[prefix + GUARD] = torch.zeros(0)
        super().save_pretrained(save_directory, *args, state_dict=stored, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'.

        Raises:
            ValueError: the stored codes are absent or damaged.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            model.get_input_embeddings().code_table().verify()
        except ValueError as error:
            raise ValueError(
                f"{args[0] if args else cls.__name__}: no usable codes among the weights ({error})"
            ) from error
        return loaded

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Only another SubEmbedding fits: the loss is tied to it."""
        if not isinstance(value, SubEmbedding):
            raise ValueError(f"the input embedding must be a SubEmbedding, not {type(value).__name__}")
        encoder = self if isinstance(self, KSubRobertaModel) else self.roberta
        encoder.embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the codes decide the vocabulary.

        Raises:
            ValueError: always, unless the size stays as it is.
        """
        size = args[0] if args else kwargs.get("new_num_tokens")
        if size in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ValueError(f"cannot resize {self.config.vocab_size} tokens to {size}: the codes decide; make new ones")

    def get_output_embeddings(self) -> None:
        """None: the decoder is tied inside the model, there is no output matrix to tie or resize."""

    def code_table(self) -> CodeTable:
        """The codes this model was built with."""
        return self.get_input_embeddings().code_table()


def _with_table(config: KSubRobertaConfig, table: CodeTable | None) -> tuple[KSubRobertaConfig, CodeTable]:
    """The configuration with the table's sizes, and the table; without one, a stand-in on the meta device."""
    if table is not None:
        if config.vocab_size != table.num_tokens:
            raise ValueError(f"config.vocab_size {config.vocab_size} is not the code table's {table.num_tokens} tokens")
        config = copy.deepcopy(config)
        config.table_sizes = list(table.table_sizes)
        return config, table
    if config.table_sizes is None or torch.get_default_device().type != "meta":
        raise ValueError("a new model needs a code table: pass table=positional_codes(...) or a loaded CodeTable")
    # transformers builds on the meta device, where only shapes count, and then reads the codes from the file.
    return config, CodeTable(np.zeros((config.vocab_size, len(config.table_sizes)), np.int32), config.table_sizes)


class KSubRobertaEmbeddings(RobertaEmbeddings):
    """RoBERTa's embeddings (positions, types, norm, dropout) over a `SubEmbedding`."""

    def __init__(self, config: KSubRobertaConfig, table: CodeTable):
        small = copy.copy(config)
        small.vocab_size = config.pad_token_id + 1  # the parent allocates vocab_size x d, which we replace
        super().__init__(small)
        self.word_embeddings = SubEmbedding(table, config.hidden_size, padding_idx=config.pad_token_id)


class KSubRobertaModel(KSubRobertaPreTrainedModel, RobertaModel):
    """The bare encoder: (batch, length) ids -> (batch, length, d) states."""

    def __init__(self, config: KSubRobertaConfig, table: CodeTable | None = None, add_pooling_layer: bool = True):
        config, table = _with_table(config, table)
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
        """(..., d) states -> (..., d) decoder inputs."""
        return self.layer_norm(F.gelu(self.dense(states)))


class KSubRobertaForMaskedLM(KSubRobertaPreTrainedModel):
    """Masked language model whose loss is exact over all N tokens and never holds N logits.

    Args:
        config: `config.vocab_size` must be the table's number of tokens.
        table: the codes; None only when transformers loads a saved folder.
    """

    def __init__(self, config: KSubRobertaConfig, table: CodeTable | None = None):
        config, table = _with_table(config, table)
        super().__init__(config)
        self.roberta = KSubRobertaModel(config, table, add_pooling_layer=False)
        self.lm_head = KSubLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_reduction: str = "mean",
        output_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Loss at the labelled positions, or dense logits when there are no labels.

        Args:
            input_ids, attention_mask: (batch, length).
            labels: (batch, length) token ids, -100 where nothing is predicted. Only labelled
                positions reach the head; the logits are then None unless `output_logits`.
            loss_reduction: "mean" over labelled positions, or "sum".
            output_logits: also return (batch, length, N) logits. N is wide.
        """
        outputs = self.roberta(input_ids, attention_mask=attention_mask, **kwargs)
        states = outputs.last_hidden_state
        embedding = self.get_input_embeddings()
        loss = logits = None
        if labels is not None:
            labelled = labels != -100
            decoder_input = self.lm_head(states[labelled])
            loss = factorized_cross_entropy(
                decoder_input, embedding, labels[labelled], self.lm_head.bias, reduction=loss_reduction
            )
        if labels is None or output_logits:
            logits = embedding.logits(self.lm_head(states), self.lm_head.bias)
        result = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return result if use_dict else result.to_tuple()

    @torch.no_grad()
    def score_masked(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[float, int, int]:
        """Summed loss, number of labelled positions whose most probable token is the label, and their count."""
        labelled = labels != -100
        states = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        decoder_input = self.lm_head(states[labelled])
        targets = labels[labelled]
        embedding, bias = self.get_input_embeddings(), self.lm_head.bias
        loss = factorized_cross_entropy(decoder_input, embedding, targets, bias, reduction="sum")
        _, best = embedding.predict_topk(decoder_input, 1, bias)
        return loss.item(), int((best.squeeze(1) == targets).sum()), len(targets)

    @torch.no_grad()
    def predict_topk(
        self, input_ids: Tensor, positions: Tensor, k: int, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k most probable tokens at chosen positions, without N logits.

        Args:
            positions: (batch, length) booleans; P of them true.

        Returns:
            (P, k) probabilities and (P, k) token ids, most probable first.
        """
        states = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        decoder_input = self.lm_head(states[positions])
        embedding, bias = self.get_input_embeddings(), self.lm_head.bias
        logits, ids = embedding.predict_topk(decoder_input, k, bias)
        log_total = log_partition(decoder_input, embedding, bias)
        return (logits - log_total.unsqueeze(1)).exp().float(), ids


class KSubRobertaForSequenceClassification(KSubRobertaPreTrainedModel, RobertaForSequenceClassification):
    """Sentence or sentence-pair classification and regression, for GLUE and XNLI; transformers' own head."""

    def __init__(self, config: KSubRobertaConfig, table: CodeTable | None = None):
        config, table = _with_table(config, table)
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.roberta = KSubRobertaModel(config, table, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()


auto.complete()
