"""Read a run folder for the report, also of a run that is still going or was interrupted."""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.pretrain.heldout_eval import accuracy_key
from ksub_ds.pretrain.open_run import OpenRun, open_run

LOG_VERSIONS = re.compile(r"^(?P<when>[\d :,-]+?),\d+ (?P<what>python [\d.]+, torch .*)$")
LOG_RANKS = re.compile(r"^[\d :,-]+ (?P<what>\d+ ranks? \(.*)$")
LOG_DEVICE = re.compile(r"^[\d :,-]+ device: (?P<what>.*)$")
LONGEST_LOG = 50_000_000  # bytes; beyond it only the beginning is looked through


@dataclass(frozen=True)
class Start:
    """One start or continuation: when, with what software, on which ranks, hosts and device (as train.log says)."""

    when: str
    versions: str
    ranks: str = ""
    device: str = ""


@dataclass(frozen=True)
class RunFiles:
    """Everything the report needs of a run.

    Attributes:
        recipe: what stands in recipe.json.
        causal: whether it trains a causal model.
        metrics: lines of metrics.jsonl, by step; loss and step are finite numbers in each.
        evaluations: lines of evaluation.jsonl, by step.
        failure: what stands in failure.json, if the last start ended before its time.
        parameters: {"embedding", "embedding_plain", "total", "total_plain", "hidden_size", "ends"}; the first two of
            one end, the input's; "ends" is 2 where the decoder has tables of its own.
    """

    path: Path
    recipe: dict[str, Any]
    causal: bool
    table: CodeTable
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    parameters: dict[str, int]
    commands: list[str]
    starts: list[Start] = field(default_factory=list)
    checkpoint_steps: list[int] = field(default_factory=list)
    failure: dict[str, Any] = field(default_factory=dict)

    def tokens_at(self, step: int) -> int | None:
        """Return the tokens seen when `step` was done; None when no line says so."""
        return 0 if step == 0 else self._tokens.get(step)

    @property
    def accuracy_key(self) -> str:
        """Under which name its lines have the share of tokens that were the most probable ones."""
        return accuracy_key(self.causal)

    @cached_property
    def _tokens(self) -> dict[int, int]:
        return {line["step"]: line["tokens"] for line in self.metrics if isinstance(line.get("tokens"), int)}


def read_run(path: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        UserError: not a run folder, or a recipe or codes that cannot be read.
    """
    run = open_run(path)
    return RunFiles(
        path=Path(path),
        recipe=run.record,
        causal=run.recipe.is_causal,
        table=run.table,
        metrics=[line for line in run.metrics if finite(line.get("loss")) is not None],
        evaluations=[line for line in run.evaluations if isinstance(line.get("languages"), dict)],
        parameters=_parameters(run),
        commands=_text(run.folder.command).splitlines(),
        starts=_starts(_text(run.folder.log)),
        checkpoint_steps=run.checkpoint_steps(),
        failure=_object(run.folder.failure),
    )


def finite(value: Any) -> float | None:
    """Return a finite number, or None for anything else, as what no float can hold."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return value if ok else None


def values(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Return the numbers that some lines of metrics have under a key."""
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def _parameters(run: OpenRun) -> dict[str, int]:
    """Count parameters on the model itself, built without memory."""
    import torch

    from ksub_ds.model.presets import fresh_model
    from ksub_ds.pretrain.resolved_run import network_config

    table = run.table
    config = network_config(run.recipe, table, None, run.folder.warm_start)
    with torch.device("meta"):
        model = fresh_model(config, table)
    total = sum(parameter.numel() for parameter in model.parameters())
    ours, plain = table.num_parameters(config.hidden_size), table.num_tokens * config.hidden_size
    ends = 1 if config.tie_word_embeddings else 2
    return {
        "embedding": ours,
        "embedding_plain": plain,
        "total": total,
        "total_plain": total + ends * (plain - ours),
        "hidden_size": config.hidden_size,
        "ends": ends,
    }


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as stream:
        return stream.read(LONGEST_LOG)


def _starts(log: str) -> list[Start]:
    starts: list[Start] = []
    for line in log.splitlines():
        if found := LOG_VERSIONS.match(line):
            starts.append(Start(found["when"].strip(), found["what"]))
        elif starts and not starts[-1].ranks and (found := LOG_RANKS.match(line)):
            starts[-1] = replace(starts[-1], ranks=found["what"])
        elif starts and not starts[-1].device and (found := LOG_DEVICE.match(line)):
            starts[-1] = replace(starts[-1], device=found["what"])
    return starts


def read_results(folders: list[Path]) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """Return results of evaluations by their files, and folders of analyses, among `folders`.

    Raises:
        UserError: a folder that holds neither results.json nor analysis.json, or one that is damaged.
    """
    results: dict[Path, dict[str, Any]] = {}
    analyses = []
    for folder in folders:
        if (folder / "analysis.json").is_file():
            analysis = read_json(folder / "analysis.json")
            if not isinstance(analysis, dict) or not analysis.get("models") or not analysis.get("settings"):
                raise UserError(f"{folder / 'analysis.json'}: is not one of `ksub analyze`; analyse again")
            analyses.append(folder)
            continue
        path = folder / "results.json" if folder.is_dir() else folder
        if not path.is_file():
            raise UserError(f"{folder}: holds neither results.json (ksub evaluate) nor analysis.json (ksub analyze)")
        result = read_json(path)
        task = result.get("task") if isinstance(result, dict) else None
        scores = {"classify": "scores", "lm": "languages"}.get(str(task), "test")
        if not isinstance(result, dict) or not isinstance(result.get(scores), dict):
            raise UserError(f"{path}: is not a results.json of `ksub evaluate` (no {scores!r})")
        results[path] = result
    return results, analyses


def quality(table: CodeTable) -> dict[str, Any]:
    """Return the quality report that clustering stored with the codes; empty without one."""
    try:
        found = json.loads(table.metadata.get("quality", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
