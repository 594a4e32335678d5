"""What is exported: the model of a checkpoint of a run, or one of our models in a folder."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.tokenizers.location import TOKENIZER_FILES
from ksub_ds.pretrain.open_run import RunCheckpoint, is_run, open_run

MODEL_FILES = "|".join(
    (
        *map(re.escape, TOKENIZER_FILES),
        r"README\.md|\.gitattributes|__pycache__|modeling_ksub\.py|model\.onnx([._]data)?",
        r"(config|generation_config|model\.safetensors\.index|compression|modules|config_sentence_transformers)\.json",
        r"sentence_\w+_config\.json|\d+_\w+|(model(-\d+-of-\d+)?|codes)\.safetensors",
    )
)
"""A regular expression of the names that `ksub export` and `ksub compress` write into a model's folder."""


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        model: a masked language model, or another of our heads, ready to evaluate.
        tokenizer: None if the model has none that this project opens.
        name: for messages and the model card.
        checkpoint: where it comes from, if it comes from a run.
        folder: the model folder it comes from, if not from a run.
    """

    model: Any
    tokenizer: Any
    name: str
    checkpoint: RunCheckpoint | None = None
    folder: Path | None = None


def open_source(run: str | Path, step: int | None = None) -> ExportSource:
    """Open what is to be exported.

    Args:
        run: a run folder, or a folder of one of our models.
        step: which checkpoint of the run. [the newest whole one]

    Raises:
        UserError: neither, or no (such) whole checkpoint.
    """
    path = Path(run)
    config = path / "config.json"
    if not is_run(path) and config.is_file():
        about = read_json(config)
        if not (isinstance(about, dict) and str(about.get("model_type", "")).startswith("ksub_")):
            raise UserError(f"{run}: is not a model over sub-embeddings; `ksub compress` makes one of it")
        if step is not None:
            raise UserError(f"--step {step}: {run} is a model, not a run; leave it out")
        return _open_folder(path)
    checkpoint = open_run(run).checkpoint(step)
    name = f"step {checkpoint.step:,} of {checkpoint.run.folder.path.resolve().name}"
    return ExportSource(checkpoint.load_model(), checkpoint.run.tokenizer, name, checkpoint)


def _open_folder(path: Path) -> ExportSource:
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.model.causal_lm import SubCausalLM
    from ksub_ds.model.loading import open_model

    model, tokenizer = open_model(path), None
    if not isinstance(model, SubCausalLM):  # its tokenizer needs neither mask nor padding: the files are copied
        try:
            tokenizer = load_tokenizer(path)
        except UserError as error:
            get_logger().info(f"{path}: what it holds of a tokenizer is copied as it is ({error})")
    return ExportSource(model, tokenizer, f"model {path.resolve().name}", folder=path)


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer that this project does not open, or need not."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def head_of(class_name: str) -> str:
    """Return what an Auto class's name has after "AutoModel", such as "ForMaskedLM"; "" for a bare network."""
    if class_name == "GPT2LMHeadModel":
        return "ForCausalLM"
    head = re.search(r"For[A-Z]\w+$", class_name)
    return head[0] if head else ""


def auto_class(folder: Path) -> Any:
    """Return transformers' Auto class for the model in a folder; our classes are registered with it."""
    import transformers

    from ksub_ds.model.registration import register

    register()
    return getattr(transformers, "AutoModel" + head_of(read_json(folder / "config.json")["architectures"][0]))


def as_choices(head: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch in the shape that a head reads: for multiple choice (batch, choices, length), one choice each.

    Args:
        head: as `head_of` names it.
        rows: (batch, length) tensors by name.
    """
    return {name: each[:, None] if head == "ForMultipleChoice" else each for name, each in rows.items()}


def tensors_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model computes, loss and logits or states, by name; caches and lists of layers are left out."""
    import torch

    return {name: each for name, each in output.items() if isinstance(each, torch.Tensor)}
