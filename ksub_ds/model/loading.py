"""Opening a trained model by folder or name: one of ours, or a plain one that can be compressed."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ksub_ds.common.errors import UserError
from ksub_ds.model.registration import register
from ksub_ds.model.replacement import CLASSES


def _classes() -> dict[str, Any]:
    """Return the plain classes and ours, by name."""
    return {each.__name__: each for pair in CLASSES.items() for each in pair}


def open_config(name: str | Path) -> PretrainedConfig:
    """Read the configuration of a model that can be compressed, from a folder or by its name.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    register()
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
    """Open a model that can be compressed, from safetensors only and without its own code.

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
