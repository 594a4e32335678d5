"""The masked language model over sub-embeddings, whatever its encoder.

Its loss is the exact masked-token loss, tied to the input tables without an N x d matrix.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput

from ksub_ds.contraction.precision import exact_products
from ksub_ds.model.base import TokenPredictor
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.softmax import factorized_cross_entropy, log_partition
from ksub_ds.model.step_loss import per_item


class SubMaskedLM(TokenPredictor):
    """A masked language model whose loss is exact over all N tokens and never holds N logits.

    Each family defines where its head and its bias are: `_decoder_input` and `_decoder_bias_module`.
    """

    def _decoder_input(self, states: Tensor) -> Tensor:
        """Apply the head without the decoder: (..., h) last states of the encoder -> (..., d) decoder inputs."""
        raise NotImplementedError

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
        num_items_in_batch: Tensor | int | None = None,
        output_predictions: bool = False,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        masked_positions: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Compute the loss at the labelled positions, or dense logits when there are none.

        The labels are given either as `labels`, or as `masked_positions` and `targets`: then the device is not asked
        where they are, and shapes do not depend on their number.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 at padding.
            labels: (batch, length) token ids, -100 where nothing is predicted. Only labelled
                positions reach the head; the logits are then None unless `output_logits`.
            loss_reduction: "mean" over labelled positions, or "sum".
            output_logits: also return (batch, length, N) logits. N is wide.
            output_correct: also return, as `correct`, at how many labelled positions the label is the most
                probable token.
            soft_targets: a teacher's distributions at the labelled positions (distillation.py), or None.
            soft_weight: their share of the loss.
            return_dict: return a `MaskedLMOutput` rather than a tuple. [as the configuration says]
            num_items_in_batch: labelled positions of the whole optimizer step, which transformers' Trainer counts. The
                loss is then the sum over this batch's divided by it, so that the losses of a step's batches add up
                to the mean. When evaluating, it also asks for `evaluation_output`.
            output_predictions: also return, as `predictions`, the most probable token at each labelled position,
                (batch, length), -100 elsewhere. Only with `labels`.
            token_type_ids: (batch, length) segments, for encoders that have them. Named, like the next, because
                the Trainer drops columns of a data set that this signature does not name.
            position_ids: (batch, length) positions. [counted]
            masked_positions: (P,) places of the labels in the flattened batch x length, in place of `labels`.
            targets: (P,) their token ids; -100 at places that count for nothing and only fill P up.
            **kwargs: passed to the encoder.

        Returns:
            Loss, logits, and the encoder's hidden states and attentions if asked for.

        Raises:
            ValueError: labels in both ways, half of a pair, or predictions without `labels`.
        """
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if num_items_in_batch is not None:
            loss_reduction = "sum"
        output_logits, output_predictions = self._asked_outputs(
            labels is not None, num_items_in_batch is not None, output_logits, output_predictions
        )
        chosen = _chosen_positions(labels, masked_positions, targets)
        outputs = self.base_model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states = outputs.last_hidden_state
        loss = logits = None
        extra: dict[str, Tensor] = {}
        if chosen is not None:
            positions, targets = chosen
            decoder_input = self._decoder_input(states.flatten(0, 1).index_select(0, positions))
            loss = self._loss(decoder_input, targets, loss_reduction, soft_targets, soft_weight)
            if num_items_in_batch is not None:
                loss = per_item(loss, num_items_in_batch, self.training)
            if output_correct or output_predictions:
                _, best = self.get_input_embeddings().most_probable(decoder_input, self.decoder_bias)
                if output_correct:
                    extra["correct"] = (best == targets).sum()
                if output_predictions and labels is not None:
                    nothing = torch.full_like(labels, -100)
                    extra["predictions"] = nothing.flatten().index_copy(0, positions, best.to(labels)).view_as(labels)
        if chosen is None or output_logits:
            logits = self.get_input_embeddings().logits(self._decoder_input(states), self.decoder_bias)
        result = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        for name, value in extra.items():
            result[name] = value
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return result if use_dict else result.to_tuple()

    def _loss(self, decoder_input: Tensor, targets: Tensor, reduction: str, soft_targets: Any, weight: float) -> Tensor:
        """Compute the loss of the labelled positions, a teacher's share included."""
        embedding, bias = self.get_input_embeddings(), self.decoder_bias
        loss = factorized_cross_entropy(decoder_input, embedding, targets, bias, reduction=reduction)
        if soft_targets is not None and weight:
            with exact_products(decoder_input.device):  # as exact as log Z, or it falls below 0
                delta = _distillation_delta(decoder_input.float(), embedding, targets, bias, soft_targets)
            loss = loss + weight * (delta / (targets != -100).sum() if reduction == "mean" else delta)
        return loss

    def _decoder_input_at(self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None) -> Tensor:
        states = self.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self._decoder_input(states.flatten(0, 1).index_select(0, positions))

    @torch.no_grad()
    def label_losses(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of every labelled position by itself.

        Args:
            input_ids: (batch, length) token ids.
            labels: (batch, length) token ids, -100 where nothing is predicted.
            attention_mask: (batch, length), 0 at padding.

        Returns:
            (P,) the labels and (P,) float64 their negative log-likelihoods.
        """
        places = (labels.flatten() != -100).nonzero().squeeze(1)
        decoder_input = self._decoder_input_at(input_ids, places, attention_mask)
        embedding, bias, targets = self.get_input_embeddings(), self.decoder_bias, labels.flatten()[places]
        logits = (decoder_input.double() * embedding(targets).double()).sum(dim=1)
        if bias is not None:
            logits = logits + bias[targets].double()
        return targets, log_partition(decoder_input, embedding, bias) - logits

    @torch.no_grad()
    def predict_topk(
        self, input_ids: Tensor, positions: Tensor, k: int, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k most probable tokens at chosen positions, without N logits.

        Args:
            input_ids: (batch, length) token ids.
            positions: (batch, length) booleans; P of them true.
            k: how many, 1 <= k <= N.
            attention_mask: (batch, length), 0 at padding.

        Returns:
            (P, k) probabilities and (P, k) token ids, most probable first.
        """
        places = positions.flatten().nonzero().squeeze(1)
        decoder_input = self._decoder_input_at(input_ids, places, attention_mask)
        embedding, bias = self.get_input_embeddings(), self.decoder_bias
        logits, ids = embedding.predict_topk(decoder_input, k, bias)
        log_total = log_partition(decoder_input, embedding, bias)
        return (logits - log_total.unsqueeze(1)).exp().float(), ids


def _chosen_positions(
    labels: Tensor | None, masked_positions: Tensor | None, targets: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return the labels, however they were given, as places in the flattened batch and their token ids.

    Raises:
        ValueError: given in both ways, or half of a pair.
    """
    if (masked_positions is None) != (targets is None):
        raise ValueError("masked_positions and targets: give both, or labels")
    if masked_positions is not None and targets is not None:
        if labels is not None:
            raise ValueError("labels: masked_positions and targets say the same; give either")
        return masked_positions, targets
    if labels is None:
        return None
    flat = labels.flatten()
    positions = (flat != -100).nonzero().squeeze(1)
    return positions, flat.index_select(0, positions)


def _distillation_delta(
    hidden: Tensor, layer: SubEmbedding, labels: Tensor, bias: Tensor | None, soft_targets: Any
) -> Tensor:
    """Return the KL to the teacher minus the cross-entropy of the labels, summed over float32 rows: log Z cancels."""
    parts = layer.to_tables(hidden).split(layer.widths, dim=-1)
    delta = -soft_targets.entropy
    counts = labels != -100  # the others only fill up, and have no teacher's probabilities either
    labels = torch.where(counts, labels, 0)
    label_codes = layer.codes[labels].long()
    own_rows = layer.dedicated_rows
    *marginals, dedicated_probs = soft_targets.marginals.split(
        [*layer.table_sizes, layer.structure.num_dedicated], dim=1
    )
    for k, (part, table) in enumerate(zip(parts, layer.tables, strict=True)):
        scores = part @ table.float().t()
        of_label = scores.gather(1, label_codes[:, k : k + 1]).squeeze(1)
        delta = delta + torch.where(counts, of_label, 0.0).sum() - (scores * marginals[k]).sum()
    if own_rows is not None:
        places = -1 - layer.structure.places[labels]
        is_own = (counts & (places >= 0)).unsqueeze(1)
        of_label = torch.where(is_own, F.embedding(places.clamp(min=0), own_rows).float(), 0.0)
        delta = delta + (hidden * (of_label - dedicated_probs @ own_rows.float())).sum()
    if bias is not None:
        of_label = torch.where(counts, bias[labels].float(), 0.0)
        delta = delta + of_label.sum() - (bias.float() * soft_targets.totals).sum()
    return delta
