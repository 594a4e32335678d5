"""Compress a trained model: its embedding becomes tables fitted to it, at both ends; all other weights stay.

    from ksub_ds import clustered_codes, compress
    small = compress("folder", clustered_codes(vectors, num_tables=3, table_size=128))

The result is a start for continued pretraining or distillation: 384 rows cannot hold what 30,000 did, and the layers
above have to learn to read what is left.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.model.base import SubEmbeddingModel
from ksub_ds.model.convert import CLASSES, embedding_matrix, replace_embeddings
from ksub_ds.model.fitting import Mixing, fit_tables


@dataclass(frozen=True)
class CompressionReport:
    """What compression did, in numbers.

    Attributes:
        error: squared distance of old and new embeddings, relative to that of one mean vector for all.
        cosine: mean cosine between old and new embeddings.
        embedding_parameters, total_parameters: before and after; the tables are what is trained.
        mixing_numbers: fixed numbers of the d x d matrix that stays with the tables; 0 if there is none.
        loss: of the callback, before and after.
    """

    num_tokens: int
    table_sizes: tuple[int, ...]
    mixing: str
    error: float
    cosine: float
    embedding_parameters: tuple[int, int]
    mixing_numbers: int
    total_parameters: tuple[int, int]
    loss: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        (old, new), (all_old, all_new) = self.embedding_parameters, self.total_parameters
        fixed = f" and {self.mixing_numbers:,} fixed numbers (the {self.mixing} matrix)" if self.mixing_numbers else ""
        lines = [
            f"embedding parameters   {old:,} -> {new:,}{fixed}",
            f"all parameters         {all_old:,} -> {all_new:,}",
            f"embedding error        {self.error:.4f} of the variance is lost; mean cosine {self.cosine:.4f}",
        ]
        if self.loss is not None:
            lines.append(f"masked-token loss      {self.loss[0]:.4f} -> {self.loss[1]:.4f} nats")
        return lines


def compress(
    model_or_name: PreTrainedModel | str | Path,
    table: CodeTable,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
) -> SubEmbeddingModel:
    """A trained model over sub-embeddings whose tables are fitted to its embedding by least squares (fitting.py).

    Args:
        model_or_name: a model, a folder in HuggingFace's form, or a name in the local cache or on the Hub; the
            families of `replace_embeddings`, or one of ours (a plain one, K = 1, too). Folders are read from
            safetensors only.
        table: codes of its tokens.
        mixing: whether a d x d matrix may stand beside the tables: "linear", "orthogonal" or "none".
        weights: (N,) how much each token counts, for example its frequency. [1]

    Raises:
        ValueError: as `replace_embeddings` and `fit_tables`; a decoder that is not tied; nothing to read there.
    """
    return compress_with_report(model_or_name, table, mixing, weights)[0]


def compress_with_report(
    model_or_name: PreTrainedModel | str | Path,
    table: CodeTable,
    mixing: Mixing = "linear",
    weights: np.ndarray | None = None,
    loss: Callable[[PreTrainedModel], float] | None = None,
) -> tuple[SubEmbeddingModel, CompressionReport]:
    """`compress`, and what it did.

    Args:
        loss: measured on the model before and after, for example its masked-token loss on some text.
    """
    model = model_or_name if isinstance(model_or_name, PreTrainedModel) else open_model(model_or_name)
    vectors = embedding_matrix(model).float().cpu().numpy()[: table.num_tokens]
    fit = fit_tables(vectors, table, mixing, weights)
    small = replace_embeddings(model, table, mixing=fit.mixing is not None)
    layer = small.get_input_embeddings()
    with torch.no_grad():
        for k, (ours, fitted) in enumerate(zip(layer.tables, fit.tables, strict=True)):
            used = torch.from_numpy(np.unique(table.codes[:, k]))
            ours += torch.from_numpy(fitted)[used].mean(dim=0)  # rows for tokens that join later: near the others
            ours[used] = torch.from_numpy(fitted).to(ours)[used]
        if layer.mixing is not None:
            layer.mixing.copy_(torch.as_tensor(fit.mixing))
    dense = layer.dense_weight().detach().float().cpu().numpy()
    report = CompressionReport(
        table.num_tokens,
        table.table_sizes,
        "none" if fit.mixing is None else mixing,
        fit.error,
        _mean_cosine(vectors, dense),
        (
            sum(each.numel() for each in model.get_input_embeddings().parameters()),
            table.num_parameters(vectors.shape[1]),
        ),
        0 if fit.mixing is None else fit.mixing.size,
        (model.num_parameters(), small.num_parameters()),
        None if loss is None else (loss(model), loss(small)),
    )
    return small, report


def _classes() -> dict[str, Any]:
    """Plain classes and ours, by name."""
    return {each.__name__: each for pair in CLASSES.items() for each in pair}


def open_config(name: str | Path) -> PretrainedConfig:
    """The configuration of a model that can be compressed, from a folder or by its name.

    Raises:
        UserError: nothing of that name, or another kind of model.
    """
    import ksub_ds  # noqa: F401 - registers our configurations with AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name}: holds no config.json; give the folder of a model")
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: transformers finds no model it knows there ({_first_line(error)})") from error
    wanted = (config.architectures or ["none named"])[0]
    if wanted not in _classes():
        families = "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT or ModernBERT"
        raise UserError(
            f"{name}: is a {wanted}; give an encoder of {families}: bare, for masked tokens or a classifier"
        )
    return config


def open_model(name: str | Path) -> PreTrainedModel:
    """A model that can be compressed, from safetensors only and without its own code.

    Raises:
        UserError: as `open_config`, or only pickled weights.
    """
    config = open_config(name)
    try:
        return _classes()[config.architectures[0]].from_pretrained(str(name), use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{name}: cannot be read ({_first_line(error)}); weights must be safetensors: pickled ones are not read, "
            "save them anew with save_pretrained() in a place you trust"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200].rstrip(". ")


def _mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / np.maximum(norms, 1e-30)).mean())
