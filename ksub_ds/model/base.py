"""What every model over sub-embeddings shares, whatever encoder stands above: saving, loading, growing, the loss.

SubEmbeddingModel   codes among the weights, the guard against the plain classes, resize_token_embeddings
SubMaskedLM         the exact masked-token loss, tied to the input tables without an N x d matrix
"""

import copy
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from ksub_ds.codes.extension import extend_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.model import auto
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.softmax import factorized_cross_entropy, log_partition


def with_table(config: Any, table: CodeTable | None) -> tuple[Any, CodeTable]:
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


class SubEmbeddingModel(PreTrainedModel):
    """What all our models share: initial values, saving with the guard, loading with a check of the codes."""

    # The guard stored beside our weights has a shape no model can take: RobertaForMaskedLM and its kin would else
    # read our folder, find no embedding, and go on with a random one after a mere warning.
    # (Who passes ignore_mismatched_sizes=True has asked for just that.)
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"embeddings\.(word|tok)_embeddings\.weight$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SubEmbedding):
            super()._init_weights(module)
            return
        for table in module.tables:
            init.normal_(table, mean=0.0, std=self.config.initializer_range)
        if module.mixing is not None:
            init.copy_(module.mixing, torch.eye(len(module.mixing)))

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As transformers', with the codes among the weights and a guard against the plain classes."""
        stored = dict(self.state_dict() if state_dict is None else state_dict)
        stored[f"{self.embedding_name()}.weight"] = torch.zeros(0)
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
            model.code_table().verify()
        except ValueError as error:
            raise ValueError(
                f"{args[0] if args else cls.__name__}: no usable codes among the weights ({error})"
            ) from error
        return loaded

    def embedding_name(self) -> str:
        """The name of the sub-embedding among the modules."""
        return next(name for name, module in self.named_modules() if isinstance(module, SubEmbedding))

    def get_input_embeddings(self) -> SubEmbedding:
        """The one sub-embedding, which the decoder is tied to."""
        return self.get_submodule(self.embedding_name())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Only another SubEmbedding fits: the loss is tied to it."""
        if not isinstance(value, SubEmbedding):
            raise ValueError(f"the input embedding must be a SubEmbedding, not {type(value).__name__}")
        self.set_submodule(self.embedding_name(), value)

    def get_output_embeddings(self) -> None:
        """None: the decoder is tied inside the model, there is no output matrix to tie or resize."""

    def code_table(self) -> CodeTable:
        """The codes this model was built with."""
        return self.get_input_embeddings().code_table()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        vectors: Any = None,
    ) -> SubEmbedding:
        """Give new tokens unused codes, or take the last tokens away. The tables stay: only the bias grows.

        Logits of the old tokens stay the same bit for bit. A new token's bias is the mean of the old ones.

        Args:
            new_num_tokens: the new N.
            pad_to_multiple_of: round N up.
            mean_resizing: as in transformers; False gives new tokens a bias of 0.
            vectors: (new tokens, d) vectors like this model's embeddings: each new token goes to the nearest leaf
                with a free code (`extend_codes`).

        Raises:
            ValueError: the tables have fewer unused codes than there are new tokens (with the count).
        """
        layer = self.get_input_embeddings()
        old = self.config.vocab_size
        size = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == old:
            return layer
        if size < 1:
            raise ValueError(f"cannot resize {old} tokens to {size}")
        table = layer.code_table()
        if size > old:
            known = None if vectors is None else layer.dense_weight().detach().float().cpu().numpy()
            table = extend_codes(table, size - old, vectors, known)
        layer.codes = torch.tensor(table.codes[:size], device=layer.codes.device)
        self._resize_bias(size, mean_resizing)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config.vocab_size = size
        return layer

    def _resize_bias(self, size: int, mean_resizing: bool) -> None:
        """Models without a bias per token have nothing to do."""


class SubMaskedLM(SubEmbeddingModel):
    """A masked language model whose loss is exact over all N tokens and never holds N logits.

    A family says where its head and its bias are: `_decoder_input` and `_bias_home`.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def _decoder_input(self, states: Tensor) -> Tensor:
        """(..., h) last states of the encoder -> (..., d) decoder inputs: the head without the decoder."""
        raise NotImplementedError

    def _bias_home(self) -> nn.Module:
        """The module whose `bias` is the decoder's, (N,), or None."""
        raise NotImplementedError

    @property
    def decoder_bias(self) -> Tensor | None:
        """(N,) the bias per token, or None."""
        return self._bias_home().bias

    def _resize_bias(self, size: int, mean_resizing: bool) -> None:
        old = self.decoder_bias
        if old is None:
            return
        with torch.no_grad():
            added = old.mean() if mean_resizing else old.new_zeros(())
            bias = torch.cat([old[:size], added.expand(max(0, size - len(old)))])
        self._bias_home().bias = nn.Parameter(bias, requires_grad=old.requires_grad)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_reduction: str = "mean",
        output_logits: bool = False,
        output_correct: bool = False,
        soft_targets: Any = None,
        soft_weight: float = 0.0,
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
            output_correct: also return, as `correct`, at how many labelled positions the label is the most
                probable token.
            soft_targets, soft_weight: a teacher's distributions at the labelled positions (distillation.py), and
                their share of the loss.
        """
        outputs = self.base_model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states = outputs.last_hidden_state
        embedding = self.get_input_embeddings()
        loss = logits = correct = None
        if labels is not None:
            labelled = labels != -100
            decoder_input, targets, bias = self._decoder_input(states[labelled]), labels[labelled], self.decoder_bias
            loss = factorized_cross_entropy(decoder_input, embedding, targets, bias, reduction=loss_reduction)
            if soft_targets is not None and soft_weight:
                change = _from_labels_to_teacher(decoder_input, embedding, targets, bias, soft_targets)
                loss = loss + soft_weight * (change / len(targets) if loss_reduction == "mean" else change)
            if output_correct:
                _, best = embedding.predict_topk(decoder_input, 1, bias)
                correct = (best.squeeze(1) == targets).sum()
        if labels is None or output_logits:
            logits = embedding.logits(self._decoder_input(states), self.decoder_bias)
        result = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        if correct is not None:
            result["correct"] = correct
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return result if use_dict else result.to_tuple()

    def _decoder_input_at(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        states = self.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self._decoder_input(states[positions])

    @torch.no_grad()
    def score_masked(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[float, int, int]:
        """Summed loss, number of labelled positions whose most probable token is the label, and their count."""
        # By way of forward: there alone ZeRO 3 gathers the weights that it has shared out.
        output = self(
            input_ids, attention_mask=attention_mask, labels=labels, loss_reduction="sum", output_correct=True
        )
        return output.loss.item(), int(output["correct"]), int((labels != -100).sum())

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
        decoder_input = self._decoder_input_at(input_ids, positions, attention_mask)
        embedding, bias = self.get_input_embeddings(), self.decoder_bias
        logits, ids = embedding.predict_topk(decoder_input, k, bias)
        log_total = log_partition(decoder_input, embedding, bias)
        return (logits - log_total.unsqueeze(1)).exp().float(), ids


def _from_labels_to_teacher(
    hidden: Tensor, layer: SubEmbedding, labels: Tensor, bias: Tensor | None, soft_targets: Any
) -> Tensor:
    """KL to the teacher minus cross-entropy of the labels, summed over the rows: log Z cancels (distillation.py)."""
    parts = layer.to_tables(hidden).split(layer.widths, dim=-1)
    change = -soft_targets.entropy
    label_codes = layer.codes[labels].long()
    marginals = soft_targets.marginals.split(layer.table_sizes, dim=1)
    for k, (part, table) in enumerate(zip(parts, layer.tables, strict=True)):
        scores = part.float() @ table.float().t()  # as exact as log Z: rounded ones make a divergence below 0
        change = change + scores.gather(1, label_codes[:, k : k + 1]).sum() - (scores * marginals[k]).sum()
    if bias is not None:
        change = change + bias[labels].float().sum() - (bias.float() * soft_targets.totals).sum()
    return change


auto.complete()
