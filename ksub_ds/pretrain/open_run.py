"""Open a run folder for reading: recipe, codes, tokenizer, metrics, and the model of a checkpoint.

    run = open_run("run")
    model = run.checkpoint().load_model()

Each part is read when it is first asked for, and once. Nothing in the folder is changed.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import read_lines
from ksub_ds.corpus.tokenizers.loading import Tokenizer, load_tokenizer
from ksub_ds.pretrain import checkpoint
from ksub_ds.pretrain.checkpoint import TrainerState, read_trainer_state
from ksub_ds.pretrain.recipe import Recipe, read_recipe
from ksub_ds.pretrain.run_folder import RunFolder

if TYPE_CHECKING:  # seconds of imports
    from ksub_ds.model.base import TokenPredictor


def is_run(path: Path) -> bool:
    """Return whether a folder is the run folder of a `ksub pretrain`."""
    return RunFolder(path).recipe.is_file()


def open_run(path: str | Path) -> "OpenRun":
    """Open a run folder for reading.

    Args:
        path: the --out folder of `ksub pretrain`.

    Raises:
        UserError: not a run folder.
    """
    folder = Path(path)
    if not is_run(folder):
        of = folder.absolute().parents[1] if folder.absolute().parent.name == checkpoint.FOLDER else None
        step = f", and for a checkpoint --step: {of}" if of is not None and is_run(of) else ""
        there = "no recipe.json there" if folder.exists() else "is not there"
        raise UserError(f"{path}: {there}; give the --out folder of `ksub pretrain`{step}")
    return OpenRun(RunFolder(folder))


class OpenRun:
    """A run folder, open for reading. A property raises a UserError if its file cannot be read.

    Args:
        folder: names the files.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    @cached_property
    def _recipe_file(self) -> tuple[Recipe, dict[str, Any]]:
        return read_recipe(self.folder.recipe)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self._recipe_file[0]

    @property
    def record(self) -> dict[str, Any]:
        """The whole content of recipe.json: the recipe, and the identity of codes and data."""
        return self._recipe_file[1]

    @cached_property
    def table(self) -> CodeTable:
        """The codes."""
        return CodeTable.load(self.folder.codes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return load_tokenizer(self.folder.tokenizer)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, one per optimizer step; empty without the file."""
        return read_lines(self.folder.metrics)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of evaluation.jsonl, one per evaluation on held-out text; empty without the file."""
        return read_lines(self.folder.evaluation)

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first, whole or not."""
        return [checkpoint.step_of(path) for path in checkpoint.checkpoints(self.folder.checkpoints)]

    def checkpoint(self, step: int | None = None) -> "RunCheckpoint":
        """Choose a whole checkpoint.

        Args:
            step: its step. [the newest whole one]

        Raises:
            UserError: there is none, or the one of this step is missing or damaged.
        """
        if step is None:
            newest = checkpoint.newest_complete(self.folder.checkpoints)
            if newest is None:
                raise UserError(f"{self.folder.checkpoints}: holds no whole checkpoint; train first")
            return RunCheckpoint(self, newest)
        path = self.folder.checkpoints / checkpoint.checkpoint_name(step)
        there = ", ".join(map(str, self.checkpoint_steps()))
        problem = checkpoint.damage(path) if path.exists() else f"there are checkpoints of step {there or '(none)'}"
        if problem:
            raise UserError(f"--step {step}: {path} cannot be used: {problem}")
        return RunCheckpoint(self, path)


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, whole when it was chosen.

    Attributes:
        run: the run.
        path: the checkpoint's folder; it may be a copy outside the run.
    """

    run: OpenRun
    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return checkpoint.step_of(self.path)

    @property
    def weights(self) -> Path:
        """The file of the master weights, by parameter name."""
        return self.path / checkpoint.WEIGHTS

    @cached_property
    def state(self) -> TrainerState:
        """Where the training stood."""
        return read_trainer_state(self.path)

    def check_codes(self) -> None:
        """Check that the codes of the run are those that the checkpoint was trained with.

        Raises:
            UserError: other codes.
        """
        if self.run.table.sha256 != self.state.codes_sha256:
            raise UserError(f"{self.path}: was trained with other codes than {self.run.folder.codes}")

    def load_model(self) -> "TokenPredictor":
        """Build the masked or causal language model with these weights, in fp32 and ready to evaluate.

        Raises:
            UserError: other codes, or weights that do not fit the recipe.
        """
        from safetensors.torch import load_file

        from ksub_ds.pretrain.builders import build_network
        from ksub_ds.pretrain.resolved_run import network_config

        self.check_codes()
        run = self.run
        config = network_config(run.recipe, run.table, run.tokenizer, run.folder.warm_start)
        model = build_network(run.recipe, config, run.table, run.folder.warm_start)
        weights, parameters = load_file(self.weights), dict(model.named_parameters())
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        wrong = [name for name in parameters if name not in weights]
        wrong += [name for name, tensor in weights.items() if shapes.get(name) != tensor.shape]
        if wrong:
            raise UserError(f"{self.path}: parameter {wrong[0]} does not fit the model of {run.folder.recipe}")
        model.load_state_dict(weights, strict=False)
        return model.eval()
