"""`ksub compress` and `ksub export`: models into other forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse


def compress(arguments: Sequence[str]) -> None:
    """Fit small tables to a trained model's embedding, with the options of convert/compress_command.py."""
    from ksub_ds.convert.compress_command import CompressModel, compress_model

    compress_model(parse(CompressModel, arguments, "ksub compress"))


def export(
    run: Positional[Path],
    out: Path,
    step: int | None = None,
    remote_code: bool = False,
    dense: bool = False,
    onnx: bool = False,
    license: str | None = None,
) -> None:
    """Write the model of a run as a HuggingFace folder, reload it and compare logits before publishing.

    Args:
        run: A run folder of `ksub pretrain`, or a folder of `ksub compress`.
        out: The folder to write.
        step: Export the checkpoint of this step. [the newest]
        remote_code: Add the model's code: the folder then opens without ksub_ds, by trust_remote_code=True.
        dense: Write a plain transformers model with its N x d matrix, which any tool opens.
        onnx: Write model.onnx too, checked with onnxruntime.
        license: License of the weights, for the model card, as the Hub spells it (apache-2.0, cc-by-4.0).

    Raises:
        UserError: options that contradict each other, or a run that cannot be exported.
    """
    from ksub_ds.convert.export import export_run

    if remote_code and dense:
        raise UserError("--remote-code and --dense: a dense folder needs no code of ours; give only one of them")
    form: Literal["ksub", "remote-code", "dense"] = "dense" if dense else "remote-code" if remote_code else "ksub"
    export_run(run, out, step, form, onnx, license)
