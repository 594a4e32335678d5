"""From a run folder to a HuggingFace folder that others can use, checked before it is published.

    ksub export RUN --out DIR                  opens after `import ksub_ds`
    ksub export RUN --out DIR --remote-code    opens without it, by trust_remote_code=True
    ksub export RUN --out DIR --dense          a plain XLM-R or RoBERTa: any tool opens it, with its N x d matrix

The model is built anew from the recipe and the codes, filled with the fp32 master weights of a checkpoint, saved to a
temporary folder, loaded back by transformers' Auto class, and both must give the same logits and loss. A folder of
one of our models (of `ksub compress`, or an earlier export) can stand for RUN.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.recipe_file import read_recipe
from ksub_ds.pretrain.run_folder import RunFolder

TOLERANCE = 1e-5  # the reloaded model makes the same numbers; this leaves room for another order of sums
DENSE_TOLERANCE = 1e-4  # N x d products instead of table scores: another order of many sums

Form = Literal["ksub", "remote-code", "dense"]


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
        step: which checkpoint; default the newest whole one.
        form: whether the folder needs ksub_ds, brings its code along, or is a plain transformers model.
        onnx: write model.onnx beside the weights, compared with onnxruntime.
        licence: of the weights, for the model card.

    Returns:
        `out`.

    Raises:
        UserError: not a run folder, no (such) whole checkpoint, a folder in the way, or the reloaded model differs.
    """
    out = Path(out)
    if out.exists() and not (out / "config.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an export and not empty; choose another folder")
    source = open_source(run, step)
    if out.exists() and Path(run).resolve() == out.resolve():
        raise UserError(f"--out {out}: is the model itself; choose another folder")
    try:
        with atomic_folder(out) as temporary:
            difference = _write(source, temporary, form, licence)
            if onnx:
                from ksub_ds.pretrain.onnx_form import write_onnx

                error = write_onnx(temporary)
                get_logger().info(f"model.onnx: run by onnxruntime and compared (largest difference {error:.1e})")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    get_logger().info(f"{out}: {source.name}, reloaded and compared (largest difference {difference:.1e})")
    return out


def _write(source: Source, folder: Path, form: Form, licence: str | None) -> float:
    """Fill a folder; the largest difference between the model and its reloaded copy."""
    from ksub_ds.model.remote_code import write_remote_code
    from ksub_ds.pretrain.compress import copy_sentence_files
    from ksub_ds.pretrain.model_card import write_model_card

    saved = _plain(source) if form == "dense" else source.model
    saved.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save(folder)
    difference = compare_with_reload(source.model, folder, source.tokenizer)
    tolerance = DENSE_TOLERANCE if form == "dense" else TOLERANCE
    if not difference <= tolerance:
        raise UserError(f"{source.name}: the exported model differs from it by {difference:g}; not published")
    if form == "remote-code":
        write_remote_code(folder, source.model)
    if source.folder is not None:
        copy_sentence_files(source.folder, folder)
    write_model_card(folder, source, form, licence)
    return difference


def _plain(source: Source) -> Any:
    """The plain transformers model: XLM-R's class for a SentencePiece tokenizer in XLM-R's layout, else RoBERTa's."""
    from transformers import XLMRobertaForMaskedLM

    from ksub_ds.corpus.xlmr_tokenizer import XlmrTokenizer
    from ksub_ds.model.convert import to_plain
    from ksub_ds.model.modeling import KSubRobertaForMaskedLM

    is_xlmr = isinstance(source.tokenizer, XlmrTokenizer) and isinstance(source.model, KSubRobertaForMaskedLM)
    try:
        return to_plain(source.model, XLMRobertaForMaskedLM if is_xlmr else None)
    except ValueError as error:
        raise UserError(f"--dense: {error}") from error


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
    folder = _open(run)
    chosen = _choose(folder, step)
    model, tokenizer = load_model(folder, chosen)
    number = checkpoint.step_of(chosen)
    return Source(model, tokenizer, f"step {number:,} of {folder.path.resolve().name}", folder, number)


def _open_folder(path: Path) -> Source:
    from ksub_ds.corpus.tokenizer import load_tokenizer
    from ksub_ds.model.compress import open_model

    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        get_logger().warning(f"{path}: its tokenizer is left out ({error})")
        tokenizer = None
    return Source(open_model(path), tokenizer, f"model {path.resolve().name}", folder=path)


def newest_checkpoint(run: str | Path) -> tuple[RunFolder, Path]:
    """The run folder and its newest whole checkpoint.

    Raises:
        UserError: not a run folder, or no whole checkpoint in it.
    """
    folder = _open(run)
    return folder, _choose(folder, None)


def _open(run: str | Path) -> RunFolder:
    folder = RunFolder(Path(run))
    if not folder.recipe.exists():
        raise UserError(f"{run}: no recipe.json there; give the --out folder of `ksub pretrain`")
    return folder


def _choose(folder: RunFolder, step: int | None) -> Path:
    if step is not None:
        path = folder.checkpoints / f"global_step{step}"
        there = ", ".join(str(checkpoint.step_of(found)) for found in checkpoint.checkpoints(folder.checkpoints))
        problem = checkpoint.fault(path) if path.exists() else f"there are checkpoints of step {there or '(none)'}"
        if problem:
            raise UserError(f"--step {step}: {path} cannot be used: {problem}")
        return path
    path = checkpoint.newest_complete(folder.checkpoints)
    if path is None:
        raise UserError(f"{folder.checkpoints}: holds no whole checkpoint; train first")
    return path


def load_model(folder: RunFolder, path: Path) -> tuple[Any, Any]:
    """The masked language model of a checkpoint, in fp32 and ready to evaluate, and its tokenizer."""
    from safetensors.torch import load_file

    from ksub_ds.corpus.tokenizer import load_tokenizer
    from ksub_ds.pretrain.prepare import build_for

    recipe, _ = read_recipe(folder.recipe)
    table, tokenizer = CodeTable.load(folder.codes), load_tokenizer(folder.tokenizer)
    if table.sha256 != read_json(path / "trainer.json").get("codes_sha256"):
        raise UserError(f"{path}: was trained with other codes than {folder.codes}")
    model = build_for(recipe, table, tokenizer, folder.warm_start)
    missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    wrong = [name for name in missing if name in dict(model.named_parameters())] + unexpected
    if wrong:
        raise UserError(f"{path}: parameter {wrong[0]} does not fit the model of {folder.recipe}")
    return model.eval(), tokenizer


def compare_with_reload(model: Any, saved: Path, tokenizer: Any) -> float:
    """Largest difference between the model and its saved copy, on a few random rows: logits, loss or states."""
    import torch

    head = head_of(type(model).__name__)
    copy = auto_class(saved).from_pretrained(saved).eval()
    num_tokens = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(num_tokens, (2, 16), generator=generator)
    if tokenizer is not None:
        input_ids_BT[:, 0], input_ids_BT[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    labels_BT = torch.randint(num_tokens, (2, 16), generator=generator)
    differences = []
    with torch.no_grad():
        for arguments in ({}, {"labels": labels_BT}) if head == "ForMaskedLM" else ({},):
            ours, theirs = (each(input_ids_BT, **arguments) for each in (model, copy))
            key = "loss" if arguments else "logits" if head else "last_hidden_state"
            differences.append((ours[key] - theirs[key]).abs().max().item())
    # max() passes over a NaN that is not first; a NaN must not look like agreement
    return max(differences) if all(value == value for value in differences) else float("nan")


def head_of(class_name: str) -> str:
    """What stands behind the family's name in a model class: "ForMaskedLM", "ForSequenceClassification" or ""."""
    return next((end for end in ("ForMaskedLM", "ForSequenceClassification") if class_name.endswith(end)), "")


def auto_class(folder: Path) -> Any:
    """transformers' Auto class for the model of a folder, which knows ours too."""
    import transformers

    import ksub_ds  # noqa: F401 - registers our classes with the Auto classes

    return getattr(transformers, "AutoModel" + head_of(read_json(folder / "config.json")["architectures"][0]))
