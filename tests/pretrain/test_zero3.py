"""ZeRO 3: every table is shared out, and nothing else changes: losses, checkpoints, export."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from ksub_ds.convert.export import export_run

from .runs import STEPS, Bench, Outcome, losses, metrics

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
FP32_SUMS = 2e-5  # as in test_repeatability


@pytest.mark.parametrize(("run", "tables"), [("two-zero3", 3), ("plain-zero3", 1)])
def test_every_rank_holds_half_of_every_table(two_ranks: dict[str, Outcome], run: str, tables: int) -> None:
    """Of the sub-embedding's small tables too, which DeepSpeed would keep whole by default."""
    for rank, held in enumerate(two_ranks[run]):
        names = [name for name in held if ".word_embeddings.tables." in name]
        assert len(names) == tables
        for name, (kept, shard, whole) in held.items():
            assert kept == 0, f"rank {rank} keeps {name}"
            assert shard == math.ceil(whole / 2), f"rank {rank} holds {shard} of {whole} of {name}"


def test_stage_3_and_offload_give_the_same_losses(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    expected = metrics(bench.folder / "reference")
    assert two_ranks["one-then-offload"] == [0, 0]
    for name in ("two-zero3", "one-then-offload"):
        found = metrics(bench.folder / name)
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                [line[key] for line in found],
                [line[key] for line in expected],
                rtol=FP32_SUMS,
                err_msg=f"{name} {key}",
            )
    ours, theirs = (
        [line.get("masked_accuracy") for line in metrics(bench.folder / name)] for name in ("two-zero3", "two")
    )
    assert ours == theirs  # of rank 0's batch: a forward pass that all ranks make
    one, three = ((bench.folder / name / "evaluation.jsonl").read_text() for name in ("reference", "two-zero3"))
    assert len(one.splitlines()) == len(three.splitlines()) == 3


def test_another_network_at_stage_3(bench: Bench, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]) -> None:
    """ModernBERT, whose embedding has another name and whose norms have no bias."""
    assert one_rank["modernbert"] == [0] and two_ranks["modernbert-zero3"] == [0, 0]
    ours, theirs = (losses(bench.folder / name) for name in ("modernbert-zero3", "modernbert"))
    np.testing.assert_allclose(ours, theirs, rtol=FP32_SUMS)
    folders = [
        export_run(bench.folder / name, bench.folder / f"export-{name}") for name in ("modernbert", "modernbert-zero3")
    ]
    one, three = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == three.keys() and "model.embeddings.tok_embeddings.codes" in one
    for key in one:
        np.testing.assert_allclose(three[key], one[key], rtol=0, atol=1e-5, err_msg=key)


def test_two_ranks_at_stage_3_then_one_at_stage_1(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    """Without --micro-batch-size it stays what it was, and dropout with it."""
    bench.copy("two-zero3", "three-then-one", 10)
    assert bench.run_all(1, [{"arguments": bench.arguments("three-then-one", micro_batch_size=None)}]) == [[0]]
    np.testing.assert_allclose(
        losses(bench.folder / "three-then-one"), losses(bench.folder / "reference"), rtol=FP32_SUMS
    )
    names = ("reference", "three-then-one", "two-zero3", "one-then-offload")
    folders = [bench.folder / name / "checkpoints" / f"global_step{STEPS}" for name in names]
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, *others = (load_file(folder / file) for folder in folders)
        for name, other in zip(names[1:], others, strict=True):
            assert first.keys() == other.keys()
            for key in first:
                np.testing.assert_allclose(other[key], first[key], atol=2e-6, err_msg=f"{name} {file} {key}")


def test_every_stage_exports_the_same_model(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    """The same run of 20 steps on two ranks: stages 1 and 2 to the bit, and so 3 and offload; all within 1e-6."""
    names = ("two", "two-zero2", "two-zero3", "two-offload", "two-zero0")
    assert two_ranks["two-offload"] == [0, 0]
    exported = {
        name: load_file(export_run(bench.folder / name, bench.folder / f"export-{name}") / "model.safetensors")
        for name in names
    }
    for name, model in exported.items():
        assert model.keys() == exported["two"].keys()
        for key in model:
            np.testing.assert_allclose(model[key], exported["two"][key], rtol=0, atol=1e-6, err_msg=f"{name} {key}")
    for one, other in (("two", "two-zero2"), ("two-zero3", "two-offload")):
        for key in exported[one]:
            np.testing.assert_array_equal(exported[one][key], exported[other][key], err_msg=f"{one} {other} {key}")
