"""`ksub analyze`: from models and a text to numbers, figures and a page of rotatable 3-D clouds.

ksub analyze model --data text --languages en fr sw --out analysis

OUT/analysis.json           every number, and what it was measured on
    embeddings.{pdf,svg,png}     PCA of each model's embedding (paper, Figure 2)
    similarity.*                 S_inter and S_intra per layer, all models (Figure 3)
    layers-NAME.*                PCA of each layer's states (Figures 4 to 10)
    tokens-NAME.*                chosen tokens through the layers
    explore.html                 the clouds, to rotate and point at; one file, no network
"""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, check_output_folder, read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.tokenizers.spelling import spellings

RESULT = "analysis.json"
WRITTEN = r"analysis\.json|explore\.html|.+\.(pdf|svg|png)"  # names in --out
FORMAT = "ksub-analysis-1"
RATIOS = (1, 2, 3, 10, 50)  # the p of the explained variance ratios that are written down


@dataclass(frozen=True)
class Analyze:
    """Measure and draw what models' embeddings and hidden states look like.

    Every number is exact over all tokens taken from the text; only the points of the clouds are a sample.
    """

    models: Positional[tuple[str, ...]]
    """Exported models, run folders, or any HuggingFace encoders or causal models; all in one set of figures."""
    data: Path
    """Folder of text: <lang>.jsonl, .txt, .parquet (compressed or not) or <lang>/, as preprocessing/shard_text.py's."""
    out: Path
    """Folder to write; an earlier analysis there is replaced."""
    languages: tuple[str, ...] = ()
    """Which languages of the text. [all]"""
    names: tuple[str, ...] = ()
    """What to call the models in legends and files, one name each. [their folders' names]"""
    tokens: tuple[str, ...] = ("the", "to", "and", "of", "a")
    """Words to follow through the layers; each must be one token of the vocabulary."""
    tokenizer: Path | None = None
    """SentencePiece .model or HuggingFace folder, for all models. [the one beside each]"""
    codes: Path | None = None
    """Code file whose last codes colour plain models; others have their own."""
    num_tokens: int = 50_000
    """How many tokens of text to pass through each model, the same number of each language."""
    sequence_length: int = 128
    """Tokens of a row, special ones included; the beginning of each document is taken."""
    points: int = 3_000
    """How many points to draw of each cloud."""
    batch_size: int = 16
    """Rows in one forward pass."""
    seed: int = 0
    """Of the points drawn."""
    text_column: str | None = None
    """Key or column of --data that holds the text. ["text", else "raw_content"]"""
    line_documents: bool = False
    """Each line of a .txt is a document. [blank lines separate documents]"""

    def layout(self) -> TextLayout:
        """Return how documents lie in the files."""
        return TextLayout(self.text_column, self.line_documents)


def analyze(settings: Analyze) -> Path:
    """Measure, draw and write everything; return the folder.

    Raises:
        UserError: an option or a folder that cannot be used; it is named.
    """
    _check(settings)
    from ksub_ds.analysis.encoders import open_encoder
    from ksub_ds.analysis.figures import save_figures, write_explorer
    from ksub_ds.analysis.measure import measure
    from ksub_ds.analysis.sample import sample_text

    codes = None if settings.codes is None else CodeTable.load(settings.codes)
    measurements, samples = [], {}
    for source, name in zip(settings.models, names_of(settings.models, settings.names), strict=True):
        encoder = open_encoder(source, name, settings.tokenizer, codes)
        length = min(settings.sequence_length, encoder.longest_row or settings.sequence_length)
        if length < settings.sequence_length:
            get_logger().info(f"{source}: has positions for {length} tokens; its rows are cut there")
        key = (encoder.tokenizer.fingerprint, length)
        if key not in samples:
            samples[key] = sample_text(
                settings.data, settings.languages, encoder.tokenizer, settings.num_tokens, length, settings.layout()
            )
        followed = _followed(settings.tokens, encoder.tokenizer.tokens(), name)
        measurements.append(
            measure(encoder, samples[key], followed, settings.points, settings.batch_size, settings.seed)
        )
    with atomic_folder(settings.out) as temporary:
        figures = save_figures(measurements, temporary)
        write_explorer(measurements, temporary / "explore.html")
        write_json(temporary / RESULT, as_json(measurements, settings, figures))
    get_logger().info(f"{settings.out}: {RESULT}, {len(figures)} figures, explore.html")
    return settings.out


def summary(out: Path) -> str:
    """Return the table that the command prints at the end: one line for each model and layer."""
    lines = [f"{'model':<20} layer   r_3  S_inter  S_intra"]
    for model in read_json(out / RESULT)["models"]:
        lines.append(f"{model['name']:<20.20}   emb  {model['embedding']['explained_variance_ratio']['3']:.3f}")
        for layer in model["layers"]:
            values = [layer["explained_variance_ratio"]["3"], layer["s_inter"], layer["s_intra"]]
            shown = ["      -" if value is None else f"{value:7.3f}" for value in values]
            lines.append(f"{'':<20}   {layer['layer']:>3} {shown[0][1:]}  {shown[1]}  {shown[2]}")
    return "\n".join(lines)


def names_of(models: Sequence[str], given: Sequence[str] = ()) -> list[str]:
    """Return a file name for every model: given, or the last part of its path, numbered where two are equal.

    Raises:
        UserError: not one name a model, or two names that are the same.
    """
    if given and len(given) != len(models):
        raise UserError(f"--names: {len(given)} names for {len(models)} models; give one each")
    raw = given or [Path(model).resolve().name if Path(model).is_dir() else Path(model).name for model in models]
    names = [re.sub(r"[^\w.+=-]+", "_", name).strip("._")[:60] or "model" for name in raw]
    if len(set(names)) < len(names):
        if given:
            raise UserError(f"--names: {max(names, key=names.count)} is given twice; give each model its own")
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def _check(settings: Analyze) -> None:
    if not settings.models:
        raise UserError("name at least one model: a folder of `ksub export`, a run, or a HuggingFace encoder")
    for key, least in (("num_tokens", 2), ("sequence_length", 3), ("points", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(settings, key)
        if value < least:
            raise UserError(f"--{key.replace('_', '-')} {value}: must be at least {least}")
    check_output_folder(settings.out, "an analysis", lambda folder: (folder / RESULT).is_file(), WRITTEN)


def _followed(words: Sequence[str], vocabulary: list[str], name: str) -> list[tuple[str, int]]:
    """Return (word, id) of each word that is one token, however this vocabulary marks the beginning of a word."""
    ids = {token: index for index, token in reversed(list(enumerate(vocabulary)))}
    found, absent = [], []
    for word in words:
        index = next((ids[spelling] for spelling in spellings(word) if spelling in ids), None)
        if index is None:
            absent.append(word)
        else:
            found.append((word, index))
    if absent:
        get_logger().warning(f"{name}: not one token here, so not followed: {', '.join(absent)}")
    return found


def as_json(measurements: Sequence[Any], settings: Analyze, figures: list[str]) -> dict[str, Any]:
    """Return everything that was measured, as JSON values.

    Args:
        measurements: one of each model.
        settings: what was asked for.
        figures: names of the files that were drawn.
    """
    import torch
    import transformers

    import ksub_ds

    return {
        "format": FORMAT,
        "models": [_model_json(each) for each in measurements],
        "figures": figures,
        "settings": {
            "data": str(settings.data),
            "languages": list(settings.languages) or sorted(measurements[0].sample.tokens_per_language),
            "num_tokens": settings.num_tokens,
            "sequence_length": settings.sequence_length,
            "points": settings.points,
            "seed": settings.seed,
            **settings.layout().recipe(),
        },
        "versions": {
            "ksub_ds": ksub_ds.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _model_json(each: Any) -> dict[str, Any]:
    encoder = each.encoder
    return {
        "name": encoder.name,
        "source": encoder.source,
        "weights_sha256": encoder.fingerprint,
        "tokenizer_fingerprint": encoder.tokenizer.fingerprint,
        "model_type": encoder.model.config.model_type,
        "num_parameters": encoder.num_parameters,
        "table_sizes": list(encoder.table_sizes),
        "tokens_per_language": each.sample.tokens_per_language,
        "embedding": {"tokens": each.embedding.axes.count, **_axes_json(each.embedding.axes)},
        "layers": [
            {
                "layer": index,
                "s_inter": layer.similarity.inter,
                "s_intra": layer.similarity.intra,
                "types": layer.similarity.types,
                "repeated_types": layer.similarity.repeated_types,
                "states": layer.cloud.axes.count,
                **_axes_json(layer.cloud.axes),
                "followed": {
                    word: {"place": _numbers(place), "cosine_to_centre": _numbers([cosine])[0]}
                    for (word, _), place, cosine in zip(each.followed, layer.followed, layer.to_centre, strict=True)
                },
            }
            for index, layer in enumerate(each.layers)
        ],
        "followed_ids": dict(each.followed),
    }


def _axes_json(axes: Any) -> dict[str, Any]:
    width = len(axes.variances)
    return {"explained_variance_ratio": {str(p): axes.explained(p) for p in RATIOS if p <= width}}


def _numbers(values: Any) -> list[float | None]:
    """Return numbers with None for NaN, which JSON lacks."""
    return [float(value) if np.isfinite(value) else None for value in values]
