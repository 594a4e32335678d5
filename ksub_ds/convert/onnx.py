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
from ksub_ds.convert.source import auto_class, head_of

NEEDS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # logits; onnxruntime fuses and reorders
OPSET = 20
PER_TEXT = ("ForSequenceClassification", "ForMultipleChoice")  # heads with one output a text


def write_onnx(folder: Path) -> float:
    """Write `folder`/model.onnx, from input_ids and attention_mask of any batch and length to its logits or states.

    For multiple choice the inputs are (batch, choices, length). The output is named `output`; for question answering
    there are two, `start_logits` and `end_logits`.

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
        """The outputs of the head as tensors."""

        def __init__(self, model: Any):
            super().__init__()
            self.model, self.head = model, head_of(type(model).__name__)
            self.names = ["start_logits", "end_logits"] if self.head == "ForQuestionAnswering" else ["output"]

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask=attention_mask)[: len(self.names)]

    # Eager attention: its masks are plain arithmetic, which the exporter follows for any length.
    # In float32: onnxruntime has no kernels for most operations in bf16 on a CPU.
    settings = {"attn_implementation": "eager", "dtype": torch.float32, "trust_remote_code": False}
    model = auto_class(folder).from_pretrained(folder, **settings).eval()
    model.config.use_cache = False
    return Outputs(model)


def _inputs(model: Any, batch: int, length: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 2, length) if model.head == "ForMultipleChoice" else (batch, length)
    ids = torch.randint(model.model.config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, ..., length // 2 :] = 0
    pad = model.model.config.pad_token_id
    if pad is not None:
        ids = torch.where(mask == 0, pad, ids)
    return {"input_ids": ids, "attention_mask": mask}


def _export(model: Any, path: Path) -> None:
    import torch

    inputs = _inputs(model, 2, 7)
    axes = ["batch", "choices", "length"] if model.head == "ForMultipleChoice" else ["batch", "length"]
    shapes = {name: {i: torch.export.Dim(axis, min=1) for i, axis in enumerate(axes)} for name in inputs}
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
                output_names=model.names,
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
        found = session.run(model.names, {name: value.numpy() for name, value in inputs.items()})
        for theirs, ours in zip(found, expected, strict=True):
            difference = (torch.from_numpy(theirs) - ours).abs()
            if model.head not in PER_TEXT:  # a row per token, and nobody reads those of the padding
                difference = difference[inputs["attention_mask"].bool()]
            worst = max(worst, float(difference.max()))
    return worst
