"""From a run folder to a HuggingFace folder that others can use, checked before it is published.

    ksub export RUN --out DIR                  opens after `import ksub_ds`
    ksub export RUN --out DIR --remote-code    opens without it, by trust_remote_code=True
    ksub export RUN --out DIR --dense          a plain transformers model, with its N x d matrix: any tool opens it

The model is built anew from the recipe and the codes, filled with the fp32 master weights of a checkpoint, saved to a
temporary folder, loaded back by transformers' Auto class, and both must give the same logits and loss. A folder of
one of our models (of `ksub compress`, or an earlier export) can stand for RUN.
"""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, check_output_folder
from ksub_ds.common.logging import get_logger
from ksub_ds.convert.model_card import is_export, write_model_card
from ksub_ds.convert.onnx import write_onnx
from ksub_ds.convert.remote_code import write_remote_code
from ksub_ds.convert.sentence_encoder import copy_sentence_files
from ksub_ds.convert.source import (
    MODEL_FILES,
    ExportSource,
    as_choices,
    auto_class,
    copy_tokenizer_files,
    head_of,
    open_source,
    tensors_of,
)
from ksub_ds.model.sequence_length import limit_tokenizer, longest_sequence

TOLERANCE = 1e-5  # the reloaded model computes the same; only the order of sums may differ
DENSE_TOLERANCE = 1e-4  # N x d products instead of table scores: another order of many sums
LONGEST_TRIED = 1024  # tokens: models of 8,192 have positions that cannot run out, and take minutes for such a text

Form = Literal["ksub", "remote-code", "dense"]


def export_run(
    run: str | Path,
    out: str | Path,
    step: int | None = None,
    form: Form = "ksub",
    onnx: bool = False,
    licence: str | None = None,
) -> Path:
    """Write the model of a run as a HuggingFace folder: config, weights with codes, tokenizer, model card.

    Args:
        run: the run folder, or a folder of one of our models.
        out: the folder to make; an earlier export there is replaced.
        step: which checkpoint. [the newest whole one]
        form: "ksub" needs ksub_ds, "remote-code" includes its code, "dense" is a plain transformers model.
        onnx: write model.onnx beside the weights, compared with onnxruntime.
        licence: of the weights, for the model card.

    Returns:
        `out`.

    Raises:
        UserError: not a run folder, no (such) whole checkpoint, a folder in the way, or the reloaded model differs.
    """
    out = Path(out)
    replaces = check_output_folder(out, "an export", is_export, MODEL_FILES, run)
    source = open_source(run, step)
    if onnx and head_of(type(source.model).__name__) == "ForCausalLM":
        raise UserError("--onnx: is for encoders; a causal model's graph would need its cache as inputs and outputs")
    try:
        with atomic_folder(out) as temporary:
            difference = _write(source, temporary, form, licence)
            if onnx:
                error = write_onnx(temporary)
                get_logger().info(f"model.onnx: run by onnxruntime and compared (largest difference {error:.1e})")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    told = ", in place of the export that was there" if replaces else ""
    get_logger().info(f"{out}: {source.name}, reloaded and compared (largest difference {difference:.1e}){told}")
    return out


def _write(source: ExportSource, folder: Path, form: Form, licence: str | None) -> float:
    """Fill a folder and return the largest difference between the model and its reloaded copy.

    Raises:
        UserError: the difference is too large, or the model has no plain form.
    """
    model = saved = source.model
    if form == "dense":
        if model.dtype.itemsize < 4:  # its N x d matrix is rounded anew: the forms are compared before that
            model = copy.deepcopy(model).float()
        saved = _plain(model, source.tokenizer)
    saved.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save(folder)
    elif source.folder is not None:
        copy_tokenizer_files(source.folder, folder)
    limit_tokenizer(folder, saved.config)
    difference = compare_with_reload(model, folder, source.tokenizer)
    tolerance = DENSE_TOLERANCE if form == "dense" else TOLERANCE
    if not difference <= tolerance:
        raise UserError(f"{source.name}: the exported model differs from it by {difference:g}; not published")
    if saved.dtype != source.model.dtype:
        saved.to(source.model.dtype).save_pretrained(folder)
    if form == "remote-code":
        write_remote_code(folder, source.model)
    if source.folder is not None:
        copy_sentence_files(source.folder, folder)
    _check_long_text(folder, source.name)
    write_model_card(folder, source, form, licence)
    return difference


def _check_long_text(folder: Path, name: str) -> None:
    """Read a text longer than the model as a user would: by the folder's tokenizer, and as a sentence encoder.

    Raises:
        UserError: the folder's model or tokenizer fails on it, or a number is not finite.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return
    longest = longest_sequence(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    text = "a " * min(longest or 0, LONGEST_TRIED) + "a b c"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        row = tokenizer(text, truncation=True, return_tensors="pt")
        model = auto_class(folder).from_pretrained(folder, trust_remote_code=False).eval()
        results = list(tensors_of(model(**as_choices(head_of(type(model).__name__), row))).values())
        if (folder / "modules.json").is_file() and find_spec("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            results.append(SentenceTransformer(str(folder), device="cpu").encode(text, convert_to_tensor=True))
    except Exception as error:  # whatever a user would see
        raise UserError(f"{name}: a text of more than {longest} tokens fails in the export ({error})") from error
    if not all(result.isfinite().all() for result in results):
        raise UserError(f"{name}: the export gives numbers that are not finite for a long text")


def _plain(model: Any, tokenizer: Any) -> Any:
    """Return the plain model: XLM-R's class if the tokenizer is SentencePiece in XLM-R's layout, else the family's.

    Raises:
        UserError: the model has no plain form.
    """
    from ksub_ds.corpus.tokenizers.xlmr import XlmrTokenizer
    from ksub_ds.model.replacement import CLASSES, to_plain

    plain_class = None
    if isinstance(tokenizer, XlmrTokenizer):
        candidates = (plain for plain, ours in CLASSES.items() if ours is type(model))
        plain_class = next((each for each in candidates if each.__name__.startswith("XLMRoberta")), None)
    try:
        return to_plain(model, plain_class)
    except ValueError as error:
        raise UserError(f"--dense: {error}") from error


def compare_with_reload(model: Any, saved: Path, tokenizer: Any) -> float:
    """Return the largest difference between a model and its saved copy on a few random rows.

    Args:
        model: one that predicts tokens (logits and loss are compared), another head or a bare one (all outputs).
        saved: folder of the copy.
        tokenizer: its special tokens begin and end the rows; None for rows of any tokens.

    Returns:
        The difference; NaN if a number is not finite.
    """
    import torch

    head = head_of(type(model).__name__)
    reloaded = auto_class(saved).from_pretrained(saved, trust_remote_code=False).eval()
    num_tokens = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(num_tokens, (2, 16), generator=generator)
    if tokenizer is not None:
        input_ids_BT[:, 0], input_ids_BT[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    labels_BT = torch.randint(num_tokens, (2, 16), generator=generator)
    if model.config.pad_token_id is None:  # causal classifiers then read one text at a time
        input_ids_BT, labels_BT = input_ids_BT[:1], labels_BT[:1]
    rows = as_choices(head, {"input_ids": input_ids_BT})
    differences = []
    with torch.no_grad():
        for arguments in ({}, {"labels": labels_BT}) if head in ("ForMaskedLM", "ForCausalLM") else ({},):
            ours, theirs = (tensors_of(each(**rows, **arguments)) for each in (model, reloaded))
            differences += [(each - theirs[name]).abs().max().item() for name, each in ours.items()]
    # max() passes over a NaN that is not first; a NaN must not look like agreement
    return max(differences) if all(value == value for value in differences) else float("nan")
