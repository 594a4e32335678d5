"""What is exported: the model of a checkpoint of a run, or one of our models in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.open_run import choose_checkpoint, load_model, open_folder
from ksub_ds.pretrain.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: a masked language model, or another of our heads, ready to evaluate.
        tokenizer: None if the model has none that can be opened.
        name: for messages and the model card.
        run: the run it comes from, if it comes from one, and the step of its checkpoint.
        folder: the model folder it comes from, if not from a run.
    """

    model: Any
    tokenizer: Any
    name: str
    run: RunFolder | None = None
    step: int | None = None
    folder: Path | None = None


def open_source(run: str | Path, step: int | None = None) -> Source:
    """What `run` names: a run's checkpoint, or one of our models in a folder.

    Raises:
        UserError: neither, or no (such) whole checkpoint.
    """
    path = Path(run)
    config = path / "config.json"
    if not (path / "recipe.json").exists() and config.is_file():
        if not str(read_json(config).get("model_type", "")).startswith("ksub_"):
            raise UserError(f"{run}: is not a model over sub-embeddings; `ksub compress` makes one of it")
        if step is not None:
            raise UserError(f"--step {step}: {run} is a model, not a run; leave it out")
        return _open_folder(path)
    folder = open_folder(run)
    chosen = choose_checkpoint(folder, step)
    model, tokenizer = load_model(folder, chosen)
    number = checkpoint.step_of(chosen)
    return Source(model, tokenizer, f"step {number:,} of {folder.path.resolve().name}", folder, number)


def _open_folder(path: Path) -> Source:
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.model.loading import open_model

    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        get_logger().warning(f"{path}: its tokenizer is left out ({error})")
        tokenizer = None
    return Source(open_model(path), tokenizer, f"model {path.resolve().name}", folder=path)


def head_of(class_name: str) -> str:
    """What stands behind the family's name in a model class: "ForMaskedLM", "ForSequenceClassification" or ""."""
    return next((end for end in ("ForMaskedLM", "ForSequenceClassification") if class_name.endswith(end)), "")


def auto_class(folder: Path) -> Any:
    """transformers' Auto class for the model of a folder, which knows ours too."""
    import transformers

    from ksub_ds.model.registration import register

    register()
    return getattr(transformers, "AutoModel" + head_of(read_json(folder / "config.json")["architectures"][0]))
