"""What every model over sub-embeddings shares, whatever its encoder: saving, loading, resizing.

The codes are saved among the weights, with a guard against the plain classes. The losses are in masked_lm.py and
causal_lm.py. PEFT, in a
process that uses it, finds defaults for our types and the embedding that an adapter replaced; nothing imports it here.
"""

import copy
import sys
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled

from ksub_ds.codes.extension import extend_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.model.embedding import NO_DECODER, SubEmbedding

# Types that PEFT has no defaults for, plain ones included: their attention's projections, as it chooses elsewhere.
LORA_TARGETS = {"ksub_distilbert": ["q_lin", "v_lin"], "ksub_modernbert": ["Wqkv"]}


def with_table(config: Any, table: CodeTable | None) -> tuple[Any, CodeTable]:
    """Return the configuration with the table's sizes, and the table; without one, a stand-in on the meta device.

    Raises:
        ValueError: the table has another number of tokens, or there is none outside the meta device.
    """
    if table is not None:
        if config.vocab_size != table.num_tokens:
            raise ValueError(f"config.vocab_size {config.vocab_size} is not the code table's {table.num_tokens} tokens")
        config = copy.deepcopy(config)
        config.table_sizes = list(table.table_sizes)
        if config.num_dedicated != table.num_dedicated:
            config.num_dedicated = table.num_dedicated
        if is_input_only(config) == table.unique:
            config.embedding_input_only = not table.unique
        return config, table
    if config.table_sizes is None or not (torch.get_default_device().type == "meta" or is_deepspeed_zero3_enabled()):
        raise ValueError("a new model needs a code table: pass table=positional_codes(...) or a loaded CodeTable")
    # transformers builds on the meta device, where only shapes count, or cut by ZeRO 3, and then reads the codes.
    codes = np.zeros((config.vocab_size, len(config.table_sizes)), np.int32)
    own = range(config.num_dedicated)
    return config, CodeTable(codes, config.table_sizes, dedicated=own, unique=not is_input_only(config))


def is_input_only(config: Any) -> bool:
    """Return whether a configuration is that of a model whose codes may repeat, so that no decoder can read them."""
    return getattr(config, "embedding_input_only", False)  # only stored where it is so


class SubEmbeddingModel(PreTrainedModel):
    """Base class of our models: initial values, saving with the guard, loading with a check of the codes."""

    # The guard stored beside our weights has a shape that no model accepts. Without it, RobertaForMaskedLM and its
    # like would read our folder, find no embedding, and continue with a random one after a mere warning.
    # (Users who pass ignore_mismatched_sizes=True have asked for just that.)
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"(embeddings\.(word|tok)_embeddings|embed_tokens|wte)\.weight$"]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        _offer_target_modules(type(self).config_class.model_type)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, SubEmbedding):
            super()._init_weights(module)
            return
        for table in module.tables:
            init.normal_(table, mean=0.0, std=self.config.initializer_range)
        if module.dedicated_rows is not None:
            init.zeros_(module.dedicated_rows)
        if module.mixing is not None:
            init.copy_(module.mixing, torch.eye(len(module.mixing)))

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save as transformers does, with the codes among the weights and a guard against the plain classes."""
        stored = dict(self.state_dict() if state_dict is None else state_dict)
        stored[f"{self.embedding_name()}.weight"] = torch.zeros(0)
        super().save_pretrained(save_directory, *args, state_dict=stored, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and check the codes.

        Raises:
            ValueError: the stored codes are absent or damaged, or weights are of other sizes than config.json says.
            RuntimeError: as transformers does.
        """
        name = args[0] if args else cls.__name__
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{name}: weights are not of the sizes that config.json says; if an earlier `ksub compress "
                "--input-only` wrote it, compress the original again"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            model.code_table().verify()
        except ValueError as error:
            raise ValueError(
                f"{name}: no usable codes among the weights ({error}); make the model again from its original"
            ) from error
        return loaded

    def embedding_name(self) -> str:
        """Return the name of the sub-embedding among the modules."""
        return next(name for name, module in self.named_modules() if isinstance(module, SubEmbedding))

    def get_input_embeddings(self) -> SubEmbedding:
        """Return the one sub-embedding, which the decoder is tied to."""
        return _active_module(self, self.embedding_name())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the sub-embedding by another one.

        Raises:
            ValueError: it is not a SubEmbedding, which the loss needs.
        """
        if not isinstance(value, SubEmbedding):
            raise ValueError(f"the input embedding must be a SubEmbedding, not {type(value).__name__}")
        self.set_submodule(self.embedding_name(), value)

    def get_output_embeddings(self) -> None:
        """Return None: the decoder is tied inside the model, and there is no output matrix to tie or resize."""

    def code_table(self) -> CodeTable:
        """Return the codes of this model."""
        return self.get_input_embeddings().code_table()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        vectors: Any = None,
    ) -> SubEmbedding:
        """Give new tokens unused codes, or remove the last tokens. The tables stay as they are: only the bias grows.

        Logits of the old tokens stay the same bit for bit. A new token's bias is the mean of the old ones.

        Args:
            new_num_tokens: the new N.
            pad_to_multiple_of: round N up.
            mean_resizing: as in transformers; False gives new tokens a bias of 0.
            vectors: (new tokens, d) vectors like this model's embeddings: each new token goes to the nearest leaf
                with a free code (`extend_codes`).

        Returns:
            The sub-embedding, with the new codes.

        Raises:
            ValueError: the size is below 1, or the tables have fewer unused codes than there are new tokens.
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
        kept = table.dedicated[table.dedicated < size]
        self._set_codes(CodeTable(table.codes[:size], table.table_sizes, dedicated=kept, unique=table.unique))
        self._resize_bias(size, mean_resizing)
        return layer

    def _set_codes(self, table: CodeTable) -> None:
        """Give the model other codes for its tables, and other dedicated tokens; rows of tokens that stay, stay."""
        for module in self.modules():
            if isinstance(module, SubEmbedding):  # one, or two where the decoder has tables of its own
                module.codes = torch.tensor(table.stored_codes, device=module.codes.device)
                module.set_dedicated(table)
            if isinstance(module, PreTrainedModel):
                module.config.vocab_size = table.num_tokens
                if module.config.num_dedicated != table.num_dedicated:
                    module.config.num_dedicated = table.num_dedicated

    def add_dedicated_rows(self, ids: Any) -> SubEmbedding:
        """Give tokens a row of their own beside the shared ones. It is zero at first: the model computes what it did.

        Args:
            ids: of the tokens; those that have a row keep it.

        Returns:
            The sub-embedding, with the new rows.

        Raises:
            ValueError: an id outside [0, N).
        """
        layer = self.get_input_embeddings()
        old = layer.code_table()
        own = np.union1d(old.dedicated, np.asarray(ids, np.int64))
        table = CodeTable(old.codes, old.table_sizes, dedicated=own, unique=old.unique)
        if table.num_dedicated != old.num_dedicated:
            self._set_codes(table)
        return layer

    def _resize_bias(self, size: int, mean_resizing: bool) -> None:
        """Resize the bias per token, in models that have one."""


class TokenPredictor(SubEmbeddingModel):
    """Base class of the models with a decoder over all N tokens: its bias, resized with the codes.

    Attributes:
        evaluation_output: what transformers' Trainer gets beside the loss when it evaluates with labels:
            "predictions", the most probable token at each place of the labels and -100 where none is predicted,
            (batch, length); "logits", (batch, length, N): N is wide; or "loss" for nothing more.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    evaluation_output: Literal["predictions", "logits", "loss"] = "predictions"

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if is_input_only(self.config):
            raise ValueError(f"{type(self).__name__}: {NO_DECODER}")

    def _decoder_bias_module(self) -> nn.Module:
        """Return the module whose `bias` is the decoder's, (N,) or None."""
        raise NotImplementedError

    @property
    def decoder_bias(self) -> Tensor | None:
        """The bias per token, (N,), or None."""
        return self._decoder_bias_module().bias

    def _asked_outputs(self, has_labels: bool, by_trainer: bool, logits: bool, predictions: bool) -> tuple[bool, bool]:
        """Return whether logits and predictions are made beside the loss: on request, or for the Trainer's evaluation.

        Raises:
            ValueError: predictions without labels.
        """
        if predictions and not has_labels:
            raise ValueError("output_predictions: needs labels, whose shape the predictions have")
        if by_trainer and not self.training:
            logits = logits or self.evaluation_output == "logits"
            predictions = predictions or (has_labels and self.evaluation_output == "predictions")
        return logits, predictions

    @torch.no_grad()
    def score_labels(self, **inputs: Tensor) -> Tensor:
        """Score a batch by its labels.

        Args:
            **inputs: as `forward` takes them: ids, attention mask, and the labels; of a masked model in either of
                their two forms.

        Returns:
            (2,) float64: the summed loss, and how many labels are the most probable token.
        """
        # Through forward, the only place where ZeRO 3 gathers the partitioned weights.
        output = self(**inputs, loss_reduction="sum", output_correct=True)
        return torch.stack([output.loss.double(), output["correct"].double()])

    def _resize_bias(self, size: int, mean_resizing: bool) -> None:
        old = self.decoder_bias
        if old is None:
            return
        with torch.no_grad():
            added = old.mean() if mean_resizing else old.new_zeros(())
            bias = torch.cat([old[:size], added.expand(max(0, size - len(old)))])
        self._decoder_bias_module().bias = nn.Parameter(bias, requires_grad=old.requires_grad)


def _offer_target_modules(model_type: str) -> None:
    """Give one of our types the default `target_modules` that PEFT has for the plain type, for each of its methods.

    Args:
        model_type: of the configuration: "ksub_roberta" has the defaults of "roberta".
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    plain = model_type.removeprefix("ksub_")
    for name, defaults in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and plain in defaults:
            defaults.setdefault(model_type, defaults[plain])
    if model_type in LORA_TARGETS:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, LORA_TARGETS[model_type])


def _active_module(model: nn.Module, name: str) -> Any:
    """Return a module, or the trainable copy that PEFT's `modules_to_save` put in its place.

    Args:
        model: that holds the module.
        name: of the module, or of the original that PEFT keeps beside the copies.
    """
    owner, _, last = name.rpartition(".")
    wrapper: Any = model.get_submodule(owner)
    if last == "original_module" and not wrapper.disable_adapters and wrapper.active_adapters:
        return wrapper.modules_to_save[wrapper.active_adapters[0]]
    return model.get_submodule(name)
