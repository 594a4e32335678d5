"""A run gives the same numbers however it is interrupted and on however many ranks it runs."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.corpus.batches import TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.pretrain.prefetch import BatchPrefetcher

from .runs import STEPS, Bench, Outcome, losses, metrics, state_bytes

pytestmark = pytest.mark.timeout(300)
FP32_SUMS = 2e-5  # relative: another order of summation, over 20 steps of training


def test_every_run_ended_well(one_rank: dict[str, Outcome]) -> None:
    assert all(outcome == [0] for outcome in one_rank.values()), one_rank


def test_loss_falls(bench: Bench, one_rank: dict[str, Outcome]) -> None:
    curve = losses(bench.folder / "reference")
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.3


def test_killed_and_continued_is_the_same_bit_for_bit(bench: Bench, one_rank: dict[str, Outcome]) -> None:
    killed = bench.start("killed", save_every_steps=10)
    path = bench.folder / "killed" / "metrics.jsonl"
    saved = bench.folder / "killed" / "checkpoints" / "global_step10"  # written beside the training
    while not saved.exists() or path.read_text().count("\n") < 12:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    assert not (bench.folder / "killed" / "checkpoints" / "global_step20").exists()

    again = bench.start("killed", save_every_steps=10)
    _, log = again.communicate(timeout=200)
    assert again.returncode == 0, log
    assert "continuing from" in log and "global_step10" in log
    reference, run = bench.folder / "reference", bench.folder / "killed"
    assert losses(run) == losses(reference)
    assert [line.get("masked_accuracy") for line in metrics(run)] == [
        line.get("masked_accuracy") for line in metrics(reference)
    ]
    assert state_bytes(run, STEPS) == state_bytes(reference, STEPS)
    assert (run / "evaluation.jsonl").read_text() == (reference / "evaluation.jsonl").read_text()
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_bf16_continues_bit_for_bit(bench: Bench, continued: dict[str, Outcome], two_ranks: dict[str, Outcome]) -> None:
    for first, second in (("bf16", "bf16-continued"), ("two-bf16", "two-bf16-continued")):
        assert losses(bench.folder / first) == losses(bench.folder / second)
        assert state_bytes(bench.folder / first, STEPS) == state_bytes(bench.folder / second, STEPS)


def test_zero_stages_agree(bench: Bench, one_rank: dict[str, Outcome], two_ranks: dict[str, Outcome]) -> None:
    for first, others in (("reference", ["zero0", "zero2"]), ("two", ["two-zero0", "two-zero2"])):
        expected = metrics(bench.folder / first)
        for name in others:
            found = metrics(bench.folder / name)
            for key in ("loss", "grad_norm"):
                np.testing.assert_allclose(
                    [line[key] for line in found], [line[key] for line in expected], rtol=FP32_SUMS
                )


def test_a_run_continues_on_another_zero_stage(bench: Bench, continued: dict[str, Outcome]) -> None:
    assert continued["zero2-to-zero0"] == [0]
    np.testing.assert_allclose(
        losses(bench.folder / "zero2-to-zero0"), losses(bench.folder / "reference"), rtol=FP32_SUMS
    )


def test_accumulating_on_one_rank_is_two_ranks(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    """Dropout included: it is seeded by the micro-batch's place in the global batch."""
    assert two_ranks["two"] == [0, 0]
    np.testing.assert_allclose(losses(bench.folder / "two"), losses(bench.folder / "reference"), rtol=FP32_SUMS)
    one, two = (metrics(bench.folder / name) for name in ("reference", "two"))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]


def test_one_rank_then_two(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    assert two_ranks["one-then-two"] == [0, 0]
    run, reference = bench.folder / "one-then-two", bench.folder / "reference"
    assert losses(run)[:10] == losses(reference)[:10]
    np.testing.assert_allclose(losses(run), losses(reference), rtol=FP32_SUMS)


def test_held_out_measure_does_not_depend_on_ranks(bench: Bench, two_ranks: dict[str, Outcome]) -> None:
    one, two = ((bench.folder / name / "evaluation.jsonl").read_text() for name in ("reference", "two"))
    assert one.splitlines()[0] == two.splitlines()[0]  # step 0: the same weights, so the same sums to the last bit
    assert len(one.splitlines()) == len(two.splitlines()) == 3


@pytest.mark.parametrize(("micro", "world"), [(2, 1), (2, 2), (2, 4), (4, 2), (8, 1)])
def test_ranks_share_one_order_of_samples_and_masks(tiny_shards: Path, micro: int, world: int) -> None:
    batches = TrainingBatches(ShardDataset.open(tiny_shards), 8, 0.7, 3, 0.15)
    for step in (0, 7):
        parts = {}
        for rank in range(world):
            with BatchPrefetcher(batches, micro, 8 // (micro * world), rank, world) as prefetcher:
                share = prefetcher.take(step)
            parts |= dict(zip(share.indices, share.micro_batches, strict=True))
        whole = batches.batch(step, 0, 8)
        for key in ("input_ids", "labels"):
            np.testing.assert_array_equal(np.concatenate([parts[index][key] for index in sorted(parts)]), whole[key])
