"""Opening a run folder: its recipe, codes, tokenizer and the weights of a checkpoint."""

from pathlib import Path
from typing import Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.recipe import read_recipe
from ksub_ds.pretrain.run_folder import RunFolder


def newest_checkpoint(run: str | Path) -> tuple[RunFolder, Path]:
    """The run folder and its newest whole checkpoint.

    Raises:
        UserError: not a run folder, or no whole checkpoint in it.
    """
    folder = open_folder(run)
    return folder, choose_checkpoint(folder, None)


def open_folder(run: str | Path) -> RunFolder:
    folder = RunFolder(Path(run))
    if not folder.recipe.exists():
        raise UserError(f"{run}: no recipe.json there; give the --out folder of `ksub pretrain`")
    return folder


def choose_checkpoint(folder: RunFolder, step: int | None) -> Path:
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

    from ksub_ds.corpus.tokenizers.loading import load_tokenizer
    from ksub_ds.pretrain.builders import build_for

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
