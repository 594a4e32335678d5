"""From a run folder to a HuggingFace folder that `AutoModelForMaskedLM` opens, checked before it is published.

    ksub export RUN --out DIR

The model is built anew from the recipe and the codes, filled with the fp32 master weights of a checkpoint, saved to a
temporary folder, loaded back by transformers' Auto class, and both must give the same logits and loss.
"""

from pathlib import Path
from typing import Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_folder, read_json
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.recipe_file import read_recipe
from ksub_ds.pretrain.run_folder import RunFolder

TOLERANCE = 1e-5  # the reloaded model makes the same numbers; this leaves room for another order of sums


def export_run(run: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Write the model of a run as a HuggingFace folder: config, weights with codes, tokenizer.

    Args:
        run: the run folder.
        out: the folder to make; an earlier export there is replaced.
        step: which checkpoint; default the newest whole one.

    Returns:
        `out`.

    Raises:
        UserError: not a run folder, no (such) whole checkpoint, a folder in the way, or the reloaded model differs.
    """
    folder, out = _open(run), Path(out)
    if out.exists() and not (out / "config.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an export and not empty; choose another folder")
    path = _choose(folder, step)
    model, tokenizer = load_model(folder, path)
    try:
        with atomic_folder(out) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save(temporary)
            difference = compare_with_reload(model, temporary, tokenizer)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{path}: the exported model differs from the checkpoint by {difference:g}; not published"
                )
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    get_logger().info(
        f"{out}: step {checkpoint.step_of(path):,}, reloaded and compared (largest difference {difference:.1e})"
    )
    return out


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
    model = build_for(recipe, table, tokenizer)
    missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    wrong = [name for name in missing if name in dict(model.named_parameters())] + unexpected
    if wrong:
        raise UserError(f"{path}: parameter {wrong[0]} does not fit the model of {folder.recipe}")
    return model.eval(), tokenizer


def compare_with_reload(model: Any, saved: Path, tokenizer: Any) -> float:
    """Largest difference in logits and loss between the model and its saved copy, on a few random rows."""
    import torch
    from transformers import AutoModelForMaskedLM

    import ksub_ds  # noqa: F401 - registers our classes with the Auto classes

    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(tokenizer.vocab_size, (2, 16), generator=generator)
    input_ids_BT[:, 0], input_ids_BT[:, -1] = tokenizer.bos_id, tokenizer.eos_id
    labels_BT = torch.randint(tokenizer.vocab_size, (2, 16), generator=generator)
    copy = AutoModelForMaskedLM.from_pretrained(saved).eval()
    differences = []
    with torch.no_grad():
        for arguments in ({}, {"labels": labels_BT}):
            ours, theirs = (each(input_ids_BT, **arguments) for each in (model, copy))
            first, second = (ours.loss, theirs.loss) if arguments else (ours.logits, theirs.logits)
            differences.append((first - second).abs().max().item())
    # max() passes over a NaN that is not first; a NaN must not look like agreement
    return max(differences) if all(value == value for value in differences) else float("nan")
