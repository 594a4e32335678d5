"""ONNX of an exported folder, for runtimes without PyTorch, compared with what PyTorch computes.

    ksub export RUN --out DIR --onnx           [--dense: the plain form]

torch's exporter (dynamo) needs onnxscript; the comparison runs onnxruntime: `pip install onnx onnxscript onnxruntime`.
"""

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.convert.source import auto_class

NEEDS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # logits; onnxruntime fuses and reorders
OPSET = 20


def write_onnx(folder: Path) -> float:
    """Write `folder`/model.onnx, from input_ids and attention_mask of any batch and length to its logits or states.

    Args:
        folder: an exported model.

    Returns:
        The largest difference from PyTorch, at other batch sizes and lengths than the export's.

    Raises:
        UserError: a package is missing, torch cannot export the model, or the results differ.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: needs {', '.join(missing)}; pip install {' '.join(NEEDS)}")
    model = _load(folder)
    path = folder / "model.onnx"
    _export(model, path)
    difference = _compare(model, path)
    if not difference <= TOLERANCE:
        raise UserError(f"--onnx: onnxruntime differs from PyTorch by {difference:g}; not published")
    return difference


def _load(folder: Path) -> Any:
    import torch

    class Outputs(torch.nn.Module):
        """The one output as a tensor."""

        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask=attention_mask)[0]

    # Eager attention: its masks are plain arithmetic, which the exporter follows for any length.
    return Outputs(auto_class(folder).from_pretrained(folder, attn_implementation="eager").eval())


def _inputs(model: Any, batch: int, length: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(model.model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    pad = model.model.config.pad_token_id
    if pad is not None:
        ids = torch.where(mask == 0, pad, ids)
    return {"input_ids": ids, "attention_mask": mask}


def _export(model: Any, path: Path) -> None:
    import torch

    inputs = _inputs(model, 2, 7)
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (),
                path,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["output"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"--onnx: torch cannot export {type(model.model).__name__} ({reason})") from error


def _compare(model: Any, path: Path) -> float:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in ((3, 11), (1, 4)):
        inputs = _inputs(model, batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
        difference = (found - expected).abs()
        if difference.dim() == 3:  # a row per token, and nobody reads those of the padding; a classifier has one a text
            difference = difference[inputs["attention_mask"].bool()]
        worst = max(worst, float(difference.max()))
    return worst
