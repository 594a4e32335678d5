"""Open any causal language model, and score windows of tokens with it.

The network runs over a batch; its last states go through the head in blocks of rows, so that the logits of a batch are
never all there. For that the model is called again with its network replaced by one that returns the states: whatever
the head does besides (GPT-NeoX's other name for it, Gemma's soft caps, Granite's scale), it does. A model whose loss
comes with a sum (`loss_reduction="sum"`: ours) is asked for that instead, and makes no logits at all. States, logits
and losses are float32 in the head, sums float64.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.finetune.classifier import find_model, read_config
from ksub_ds.evaluate.lm.tokens import Window

BLOCK_NUMBERS = {"cpu": 2**24, "cuda": 2**28}  # logits that are there at one time


def check_causal(model: str) -> Any:
    """Refuse a model that gives no probability to a text, before anything is read or written.

    Args:
        model: a folder, or a name on the hub.

    Returns:
        Its configuration.

    Raises:
        UserError: not a model, or a masked one, an encoder-decoder, or one without a head for the next token.
    """
    from ksub_ds.model.loading import has_causal_form, has_masked_form

    find_model(model, "--model")
    config = read_config(model)
    kind, causal = None, has_causal_form(config)
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif has_masked_form(config) and not (causal and getattr(config, "is_decoder", False)):
        kind = "a masked language model or its encoder"
    elif not causal:
        kind = "a model that transformers has no causal form of"
    if kind is not None:
        raise UserError(
            f"--model {model}: is {kind} ({config.model_type}), which gives no probability to a text; give a causal "
            "model, such as gpt2"
        )
    return config


class CausalScorer:
    """A causal model that is ready to score.

    Args:
        path: a folder, or a name on the hub, that `check_causal` accepts.
        precision: of the network, "fp32" or "bf16"; the head is float32 always.
        device: where it runs.

    Raises:
        UserError: it cannot be opened, or weights are absent.
    """

    def __init__(self, path: str, precision: str, device: torch.device):
        self._model = _open(path).to(device).eval()
        self._precision, self._device = precision, device
        self.vocab_size = int(self._model.config.get_text_config().vocab_size)
        numbers = BLOCK_NUMBERS.get(device.type, BLOCK_NUMBERS["cpu"])
        self._rows_at_once = max(1, numbers // self.vocab_size)
        self._sums_loss = "loss_reduction" in inspect.signature(self._model.forward).parameters
        self._has_head_apart = self._sums_loss or self._head_can_be_apart()
        if not self._has_head_apart:
            get_logger().info(f"{path}: its head cannot be called apart; the logits of each batch are made at once")

    @torch.no_grad()
    def nats(self, documents: Sequence[np.ndarray], parts: Sequence[tuple[int, Window]]) -> np.ndarray:
        """Score some windows as one batch.

        Args:
            documents: the ids of each document, (n,) int64.
            parts: (number of a document, window of it).

        Returns:
            (len(parts),) float64: the negative log-likelihood of what each window predicts.
        """
        inputs = self._padded([documents[number][part.begin : part.end] for number, part in parts])
        targets = [torch.from_numpy(documents[number][part.first : part.end + 1]) for number, part in parts]
        rows = [slice(part.first - 1 - part.begin, part.end - part.begin) for _, part in parts]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            if not self._has_head_apart:
                logits = self._model(**inputs, use_cache=False).logits
                return _sums(_losses(torch.cat([logits[i, kept] for i, kept in enumerate(rows)]), targets), targets)
            output = self._model.base_model(**inputs, use_cache=False, return_dict=True)
        states = [output.last_hidden_state[index, kept].float() for index, kept in enumerate(rows)]
        with self._network_gives(output):
            if self._sums_loss:
                return np.array([self._own_loss(output, *each) for each in zip(states, targets, strict=True)])
            blocks = torch.cat(states).split(self._rows_at_once)
            wanted = torch.cat(targets).split(self._rows_at_once)
            losses = [_losses(self._logits(output, block), [each]) for block, each in zip(blocks, wanted, strict=True)]
        return _sums(torch.cat(losses), targets)

    def _padded(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Lay rows side by side, padded on the right: no token sees what stands behind it."""
        longest = max(map(len, rows))
        ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        inputs = {"input_ids": torch.from_numpy(ids).to(self._device)}
        if not mask.all():
            inputs["attention_mask"] = torch.from_numpy(mask).to(self._device)
        return inputs

    def _own_loss(self, output: Any, states: Tensor, targets: Tensor) -> float:
        """Return the loss that the model sums itself, of (n, d) states that predict (n,) targets."""
        # it shifts the labels, so that a state predicts the label behind it
        output.last_hidden_state = torch.cat([states, states[-1:]]).unsqueeze(0)
        labels = functional.pad(targets, (1, 0)).unsqueeze(0).to(self._device)
        return float(self._model(labels, labels=labels, loss_reduction="sum").loss)

    def _logits(self, output: Any, states: Tensor) -> Tensor:
        """Return what the head makes of (n, d) states: (n, N)."""
        output.last_hidden_state = states.unsqueeze(0)
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self._device)
        logits: Tensor = self._model(ids, use_cache=False).logits[0]
        return logits

    @contextlib.contextmanager
    def _network_gives(self, output: Any) -> Iterator[None]:
        """Let the model's network return an output instead of running.

        Yields:
            Nothing.
        """
        network = self._model.base_model
        network.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            del network.forward

    @torch.no_grad()
    def _head_can_be_apart(self) -> bool:
        """Return whether the model called in two parts gives what it gives in one."""
        ids = torch.arange(4, device=self._device).clamp(max=self.vocab_size - 1).unsqueeze(0)
        whole = self._model(ids, use_cache=False).logits[0]
        try:
            output = self._model.base_model(ids, use_cache=False, return_dict=True)
            states = output.last_hidden_state[0].clone()
            with self._network_gives(output):
                apart = self._logits(output, states)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        return apart.shape == whole.shape and torch.allclose(apart, whole, rtol=1e-4, atol=1e-5)


def _losses(logits: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Return the loss of each row of (n, N) logits, (n,) float32."""
    return functional.cross_entropy(logits.float(), torch.cat([*targets]).to(logits.device), reduction="none")


def _sums(losses: Tensor, targets: Sequence[Tensor]) -> np.ndarray:
    """Add up, in float64, the losses that belong to the targets of each window."""
    return np.array([float(part.sum()) for part in losses.double().split([len(each) for each in targets])])


def _open(path: str) -> Any:
    """Open a causal model in float32, from safetensors only and without its own code.

    Raises:
        UserError: transformers cannot open it, or weights are absent.
    """
    from transformers import AutoModelForCausalLM

    from ksub_ds.model.loading import quiet_transformers
    from ksub_ds.model.registration import register

    register()
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises many kinds
            reason = one_line(error)
            raise UserError(f"--model {path}: transformers cannot open this model ({reason})") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise UserError(f"--model {path}: {len(absent)} weights are absent, for example {absent[0]!r}; save it anew")
    return model
