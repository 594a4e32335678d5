"""What is exported: the model of a checkpoint of a run, or one of our models in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain.open_run import RunCheckpoint, is_run, open_run


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        model: a masked language model, or another of our heads, ready to evaluate.
        tokenizer: None if the model has none that can be opened.
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
        if not str(read_json(config).get("model_type", "")).startswith("ksub_"):
            raise UserError(f"{run}: is not a model over sub-embeddings; `ksub compress` makes one of it")
        if step is not None:
            raise UserError(f"--step {step}: {run} is a model, not a run; leave it out")
        return _open_folder(path)
    checkpoint = open_run(run).checkpoint(step)
    name = f"step {checkpoint.step:,} of {checkpoint.run.folder.path.resolve().name}"
    return ExportSource(checkpoint.load_model(), checkpoint.run.tokenizer, name, checkpoint)


def _open_folder(path: Path) -> ExportSource:
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.model.loading import open_model

    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        get_logger().warning(f"{path}: its tokenizer is left out ({error})")
        tokenizer = None
    return ExportSource(open_model(path), tokenizer, f"model {path.resolve().name}", folder=path)


def head_of(class_name: str) -> str:
    """Return the end of a model class's name: "ForMaskedLM", "ForSequenceClassification", or "" for a bare encoder."""
    return next((end for end in ("ForMaskedLM", "ForSequenceClassification") if class_name.endswith(end)), "")


def auto_class(folder: Path) -> Any:
    """Return transformers' Auto class for the model in a folder; our classes are registered with it."""
    import transformers

    from ksub_ds.model.registration import register

    register()
    return getattr(transformers, "AutoModel" + head_of(read_json(folder / "config.json")["architectures"][0]))
