"""What a GPU runs, on an accelerator that is not there: no mix of devices, and no wait, copy or float64 work that is
not in allowed.toml.

run_cases.py runs all of it once, in a process of its own; these tests read its reports.
"""

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ksub_ds import CodeTable, positional_codes
from ksub_ds.codes.trie import build_trie, merge_equal_states
from ksub_ds.contraction.sum_product import Contraction, SparseLevel

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]  # the first of them runs all cases
HERE = Path(__file__).parent / "device"
PACKAGE = HERE.parents[1] / "ksub_ds"
ALLOWED = tomllib.loads((HERE / "allowed.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("device") / "reports.json"
    command = [sys.executable, str(HERE / "run_cases.py"), str(path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def events(reports: dict[str, Any], kind: str) -> Iterator[tuple[str, str, str]]:
    """(event as the list names it, case, file:line) of what the package did; what a case itself did is left out."""
    for case, report in reports.items():
        for place, operation, _ in report.get(kind, []):
            if not place.startswith("__main__."):
                event = place if kind == "doubles" else f"{place}: {operation}"
                yield event, case, f"{report['lines'][place]} {operation}"


def total(report: dict[str, Any], kind: str) -> int:
    return sum(count for *_, count in report[kind])


def test_every_case_runs_and_gives_what_the_cpu_gives(reports: dict[str, Any]) -> None:
    failed = {case: report["error"] for case, report in reports.items() if "error" in report}
    assert not failed, "\n".join(f"{case}:\n{error}" for case, error in failed.items())


@pytest.mark.parametrize("kind", ["waits", "copies", "doubles"])
def test_nothing_happens_that_is_not_listed(reports: dict[str, Any], kind: str) -> None:
    new = {
        f"{event} in {line} ({case})"
        for event, case, line in events(reports, kind)
        if not any(fnmatchcase(event, pattern) for pattern in ALLOWED[kind])
    }
    assert not new, f"{kind} that allowed.toml does not list:\n" + "\n".join(sorted(new))


@pytest.mark.parametrize("kind", ["waits", "copies", "doubles"])
def test_nothing_is_listed_that_does_not_happen(reports: dict[str, Any], kind: str) -> None:
    happened = {event for event, *_ in events(reports, kind)}
    unused = [pattern for pattern in ALLOWED[kind] if not any(fnmatchcase(event, pattern) for event in happened)]
    assert not unused


def test_an_optimizer_step_waits_once(reports: dict[str, Any]) -> None:
    """Whatever it has of accuracy, teacher and precision; the loss in torch asks too, once a block of rows."""
    steps = {case: report for case, report in reports.items() if case.startswith("optimizer step")}
    assert len(steps) >= 4  # and one with the fused loss, where Triton is
    for case, report in steps.items():
        waits = [
            (place, count) for place, _, count in report["waits"] if place != "ksub_ds.model.softmax._TrieLoss.softmax"
        ]
        assert waits == [("ksub_ds.common.distributed.NumbersToRead.read", 1)], case
        assert total(report, "waits") <= 3, case  # two micro-batches of a block each


def test_the_fused_loss_has_few_kernels(reports: dict[str, Any]) -> None:
    """At most 40 a micro-batch, forward and backward; the step has two."""
    report = reports.get("optimizer step with the fused loss")
    if report is None:
        pytest.skip("Triton is not installed")
    ours = ("ksub_ds.model.softmax.", "ksub_ds.contraction.fused.")
    assert sum(count for place, _, count in report["kernels"] if place.startswith(ours)) <= 2 * 40


def test_the_kernels_of_the_loss_do_not_grow(reports: dict[str, Any]) -> None:
    found = {case: total(reports[case], "kernels") for case in ALLOWED["kernels_of"]}
    assert {case: number for case, number in found.items() if number > ALLOWED["kernels_of"][case]} == {}, found


def test_the_accelerator_counts_and_refuses(reports: dict[str, Any]) -> None:
    counted = reports["the accelerator: what it counts"]
    waits = {operation: count for _, operation, count in counted["waits"]}
    assert waits == {"an index by booleans": 1, "nonzero": 1, "item": 1, "copy to the host": 1}
    assert total(counted, "copies") == 2 and total(counted, "doubles") == 3
    assert total(reports["the accelerator: what it refuses"], "waits") == 0


def branches() -> dict[str, list[str]]:
    """Where the package asks for a kind of device: {module.function: [file:line]}."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for name, node in _named_nodes(ast.parse(path.read_text(encoding="utf-8")), module):
            if isinstance(node, ast.Attribute | ast.Call) and _asks_for_the_device(node):
                found.setdefault(name, []).append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return found


def _asks_for_the_device(node: ast.Attribute | ast.Call) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).endswith("has_gpu")
    if node.attr == "type":
        return "device" in ast.unparse(node.value)
    return node.attr in ("is_cuda", "is_cpu") or ast.unparse(node).startswith("torch.cuda.")


def _named_nodes(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(tree):
        inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield name, child
        yield from _named_nodes(child, f"{name}.{child.name}" if inner else name)


def test_branches_on_the_kind_of_device_are_listed() -> None:
    found = branches()
    new = [line for name, lines in found.items() if name not in ALLOWED["branches"] for line in lines]
    assert not new, "allowed.toml does not list:\n" + "\n".join(new)
    assert not set(ALLOWED["branches"]) - set(found)


def test_codes_that_matter_need_no_sparse_matrix() -> None:
    """XLM-R's vocabulary needs none, by digits or in balanced clusters: those are slow, and wait to be made."""
    count = 250_002
    token = np.arange(count)
    clustered = CodeTable(np.stack([token % 2**14 // 128, token % 128, token // 2**14], axis=1), (128, 128, 128))
    for table in (positional_codes(count, 3), clustered):
        trie = build_trie(table.codes, table.table_sizes)
        for levels in (trie, merge_equal_states(trie)):
            contraction = Contraction(levels, torch.device("cpu"), torch.float32)
            assert contraction.leaf_shape.is_dense
            assert not any(isinstance(level, SparseLevel) for level in contraction.inner)
