"""Pass a text through a model once (or a few times) and measure its embedding and every layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ksub_ds.analysis.encoders import Encoder
from ksub_ds.analysis.geometry import PrincipalAxes, PrincipalAxesEstimator, Similarity, SimilarityEstimator
from ksub_ds.analysis.sample import Batch, TextSample, batches
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import Progress

EMBEDDING_BLOCK = 8_192  # rows of the embedding that exist at one time
MEMORY_FOR_SUMS = 2_000_000_000  # bytes; beyond it the text passes again, for a few layers each time


@dataclass(frozen=True)
class Cloud:
    """Vectors in their first three principal axes, a sample of them drawn.

    Attributes:
        axes: of all vectors.
        tokens: (n,) token ids of the sampled points.
        points: (n, 3) their coordinates.
    """

    axes: PrincipalAxes
    tokens: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class Layer:
    """One layer's states: 0 is the embedding's output, with positions; L the last.

    Attributes:
        followed: (c, 3) where the mean state of each followed token lies; NaN for one that does not occur.
        to_centre: (c,) cosine of that mean state with the mean of all states.
    """

    cloud: Cloud
    similarity: Similarity
    followed: np.ndarray
    to_centre: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model; `followed` names the followed tokens by (word, id)."""

    encoder: Encoder
    sample: TextSample
    embedding: Cloud
    layers: list[Layer]
    followed: list[tuple[str, int]]


def measure(
    encoder: Encoder,
    sample: TextSample,
    followed: list[tuple[str, int]],
    num_points: int,
    batch_size: int = 16,
    seed: int = 0,
) -> Measurement:
    """Pass the text through the model and measure its embedding and all layers.

    Args:
        encoder: the model.
        sample: the text.
        followed: (word, token id) of the tokens to follow through the layers.
        num_points: how many vectors of each cloud to draw; the statistics are of all.
        batch_size: rows of a forward pass.
        seed: of that draw.
    """
    made = batches(sample, encoder.tokenizer, batch_size)
    config = encoder.model.config
    num_layers, dim = config.num_hidden_layers + 1, config.hidden_size
    at_once = max(1, MEMORY_FOR_SUMS // (8 * dim * max(1, int((sample.counts >= 2).sum()))))
    groups = [range(first, min(first + at_once, num_layers)) for first in range(0, num_layers, at_once)]
    drawn = _draw(sample.num_tokens, num_points, seed)
    layers: list[Layer] = []
    with Progress(sample.num_tokens * len(groups), "tokens", encoder.name) as progress, torch.inference_mode():
        embedding = _measure_embedding(encoder, num_points, seed)
        for group in groups:
            streams = [_LayerStream(sample, dim, followed) for _ in group]
            start = 0
            for tokens, states in _states(encoder, made, group):
                keep = drawn[start : start + len(tokens)]
                for stream, layer_states in zip(streams, states, strict=True):
                    stream.add(tokens, layer_states, keep)
                start += len(tokens)
                progress.advance(len(tokens))
            layers += [stream.result() for stream in streams]
    return Measurement(encoder, sample, embedding, layers, followed)


def _draw(total: int, count: int, seed: int) -> Tensor:
    """Return (total,) booleans, `count` of them true (or all, when there are fewer)."""
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    return torch.from_numpy(chosen)


def _measure_embedding(encoder: Encoder, num_points: int, seed: int) -> Cloud:
    """Return the PCA of all N rows, of which only a block exists at a time (paper, Figure 2)."""
    layer = encoder.model.get_input_embeddings()
    count = layer.num_embeddings
    # ELECTRA and ALBERT embed in another width than their layers have
    estimator = PrincipalAxesEstimator(layer(torch.zeros(1, dtype=torch.long)).shape[-1])
    for start in range(0, count, EMBEDDING_BLOCK):
        estimator.add(layer(torch.arange(start, min(start + EMBEDDING_BLOCK, count))))
    axes = _finite(estimator.result())
    tokens = torch.flatten(torch.nonzero(_draw(count, num_points, seed)))
    return Cloud(axes, tokens.numpy(), axes.project(layer(tokens)))


def _finite(axes: PrincipalAxes) -> PrincipalAxes:
    if not torch.isfinite(axes.variances).all():
        raise UserError("the model's vectors are not finite (NaN or infinity): it has diverged; analyse another one")
    return axes


def _states(encoder: Encoder, made: list[Batch], group: range) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Run the model over all batches.

    Yields:
        (n,) ids of a batch's ordinary tokens, and their (n, d) states in each layer of the group.
    """
    for batch in made:
        output = encoder.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        yield (
            batch.input_ids[batch.ordinary],
            [output.hidden_states[index][batch.ordinary] for index in group],
        )


class _LayerStream:
    """Everything about one layer that is accumulated while the text passes."""

    def __init__(self, sample: TextSample, dim: int, followed: list[tuple[str, int]]):
        self._similarity = SimilarityEstimator(sample.counts, dim)
        self._axes = PrincipalAxesEstimator(dim)
        self._followed = followed
        self._followed_sums = torch.zeros(len(followed), dim, dtype=torch.float64)
        self._counts = sample.counts
        self._tokens: list[Tensor] = []
        self._kept: list[Tensor] = []

    def add(self, tokens: Tensor, states: Tensor, keep: Tensor) -> None:
        """Add (n,) ids and their (n, d) states; `keep` (n,) says which to keep as points."""
        self._similarity.add(tokens, states)
        self._axes.add(states)
        for index, (_, token) in enumerate(self._followed):
            self._followed_sums[index] += states[tokens == token].double().sum(dim=0)
        self._tokens.append(tokens[keep])
        self._kept.append(states[keep].float().clone())

    def result(self) -> Layer:
        axes = _finite(self._axes.result())
        counts = torch.tensor([float(self._counts[token]) for _, token in self._followed], dtype=torch.float64)
        means = self._followed_sums / counts.unsqueeze(1)  # 0 / 0 is NaN: the token does not occur
        to_centre = torch.nn.functional.cosine_similarity(means, axes.mean.unsqueeze(0), dim=1)
        tokens, kept = torch.cat(self._tokens).numpy(), torch.cat(self._kept)
        return Layer(
            cloud=Cloud(axes, tokens, axes.project(kept)),
            similarity=self._similarity.result(),
            followed=axes.project(means),
            to_centre=to_centre.numpy(),
        )
