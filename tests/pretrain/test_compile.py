"""--compile: one graph a training, the same losses bit for bit, and a plain line where it cannot be; out of memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ksub_ds import KSubRobertaForMaskedLM
from ksub_ds.common.exit_codes import DONE, USER_ERROR
from ksub_ds.model import compilation
from ksub_ds.pretrain import builders
from ksub_ds.pretrain.__main__ import main
from ksub_ds.pretrain.recipe import Recipe, changed_keys, parse_recipe, resolve, to_json
from ksub_ds.pretrain.resolved_run import open_sources, resolve_settings

from .runs import Bench, losses, metrics, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
SHORT = {"max_steps": 6, "eval_every": 3, "save_every_steps": 6, "seed": 9}


@pytest.fixture(autouse=True)
def no_graphs_left() -> Iterator[None]:
    yield
    torch.compiler.reset()


def start_lines(run: Path) -> str:
    return (run / "train.log").read_text()


def attention_of(graph: Any) -> list[Any]:
    nodes = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(nodes) == 2, "one a layer"
    return nodes


def test_one_graph_and_the_same_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with and without padding, masked accuracy and evaluation: nothing more is compiled, nothing changes."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    assert main(bench.arguments("eager", **SHORT)) == DONE
    assert counter.frame_count == 0
    assert main(bench.arguments("compiled", "--compile", **SHORT)) == DONE
    assert counter.frame_count == 1
    assert {str(node.kwargs["attn_mask"]) for node in attention_of(counter.graphs[0])} == {"None"}, "as flash wants it"
    eager, compiled = bench.folder / "eager", bench.folder / "compiled"
    assert metrics(eager)[-1]["tokens"] < 6 * 8 * 64, "some row has padding"
    assert losses(compiled) == losses(eager)
    assert (compiled / "evaluation.jsonl").read_text() == (eager / "evaluation.jsonl").read_text()
    assert state_bytes(compiled, 6) == state_bytes(eager, 6), "names of weights included"
    assert "device: cpu; loss in torch" in start_lines(compiled)
    assert "; attention by sdpa; encoder compiled\n" in start_lines(compiled)
    assert "encoder not compiled (--compile is not given)" in start_lines(eager)


def test_a_backend_that_fails_is_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("there is no compiler\nat all")

    monkeypatch.setattr(compilation, "BACKEND", broken)
    assert main(bench.arguments("no-compiler", "--compile", max_steps=2, eval_every=0)) == DONE
    assert "Traceback" not in capfd.readouterr().err
    line = next(line for line in start_lines(bench.folder / "no-compiler").splitlines() if "device:" in line)
    assert "encoder not compiled (BackendCompilerFailed: " in line and "there is no compiler at all" in line
    assert len(metrics(bench.folder / "no-compiler")) == 2


def test_zero_3_is_not_compiled(bench: Bench) -> None:
    run = open_sources(resolve_settings(parse_recipe(bench.arguments("zero3", "--compile"))))
    engine: Any = SimpleNamespace(config={"zero_optimization": {"stage": 3}})
    assert "ZeRO 3 gathers weights" in str(builders.compile_where_possible(run, engine, None))  # type: ignore[arg-type]


def test_the_flag(bench: Bench) -> None:
    for words, cpu, gpu in (([], False, True), (["--compile"], True, True), (["--no-compile"], False, False)):
        recipe = parse_recipe(bench.arguments("flag", *words))
        found = [resolve(recipe, 1, on_gpu).compile for on_gpu in (False, True)]
        assert found == [cpu, gpu]
    now = to_json(Recipe("tiny", bench.data, bench.folder, bench.codes))
    assert changed_keys(now, now | {"compile": True, "deterministic": True}) == []


def test_out_of_memory_is_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the error that CUDA's allocator raises; test_broken_ranks.py has one of a real allocation."""
    forward, calls = KSubRobertaForMaskedLM.forward, []

    def too_much(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(KSubRobertaForMaskedLM, "forward", too_much)
    assert main(bench.arguments("memory", max_steps=4, eval_every=0)) == USER_ERROR
    lines = capfd.readouterr().err.splitlines()
    expected = "out of memory on cpu: --micro-batch-size 4 of 64 tokens is too much; try --micro-batch-size 2"
    assert lines[-1] == f"error: {expected}" and not [line for line in lines if line.startswith("Traceback")]
    assert json.loads((bench.folder / "memory" / "failure.json").read_text())["reason"] == expected
