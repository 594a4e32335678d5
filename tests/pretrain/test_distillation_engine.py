"""Learning from a teacher on two ranks: in fp32, in bf16, over ZeRO 3, and after an interruption."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ksub_ds.cli import main

from .runs import Bench, Outcome, losses, metrics, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
LAST, MIDDLE = 6, 3
FP32_SUMS = 2e-5  # relative, as in test_repeatability
# stage 3 last: it replaces torch's linear function, which the teacher uses too, for the rest of the process
KINDS = {
    "two": {},
    "bf16": {"precision": "bf16"},
    "zero3": {"deepspeed": "zero3"},
    "zero3-bf16": {"deepspeed": "zero3", "precision": "bf16"},
}


@pytest.fixture(scope="module")
def taught(bench: Bench, tiny_tokenizer: Path) -> dict[str, Outcome]:
    """Runs taught-KIND on two ranks, taught-KIND-continued from the middle, taught-one on one, taught-none alone."""
    import torch

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, plain_codes
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    teacher, small = bench.folder / "teacher", bench.folder / "student"
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=tokenizer.vocab_size, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model = KSubRobertaForMaskedLM(config, plain_codes(tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # a teacher that is sure of something
    model.save_pretrained(teacher)
    tokenizer.save(teacher)
    assert main(["compress", str(teacher), "--num-tables", "3", "--table-size", "16", "--out", str(small)]) == 0

    def entry(name: str, **settings: object) -> dict:
        values = {"codes": None, "warm_start": small, "distill_from": teacher, "max_steps": LAST, "eval_every": LAST}
        values |= {"save_every_steps": MIDDLE, "log_every_steps": MIDDLE, "eval_sequences": 2, "distill_weight": 0.7}
        return {"arguments": bench.arguments(f"taught-{name}", **values | settings)}

    alone = [entry("one"), entry("none", distill_from=None, distill_weight=None)]
    done = dict(zip(("one", "none"), bench.run_all(1, alone), strict=True))
    done |= dict(zip(KINDS, bench.run_all(2, [entry(kind, **KINDS[kind]) for kind in KINDS]), strict=True))
    again = [entry(f"{kind}-continued", **KINDS[kind]) for kind in KINDS]
    for kind in KINDS:
        bench.copy(f"taught-{kind}", f"taught-{kind}-continued", MIDDLE)
    return done | dict(zip([f"{kind}-continued" for kind in KINDS], bench.run_all(2, again), strict=True))


def test_every_run_ended_well(taught: dict[str, Outcome]) -> None:
    assert {name: set(outcome) for name, outcome in taught.items()} == {key: {0} for key in taught}


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_is_the_same_bit_for_bit(bench: Bench, taught: dict[str, Outcome], kind: str) -> None:
    run, again = bench.folder / f"taught-{kind}", bench.folder / f"taught-{kind}-continued"
    assert losses(run) == losses(again) and len(losses(run)) == LAST
    assert "continuing from" in (again / "train.log").read_text()
    assert state_bytes(run, LAST) == state_bytes(again, LAST)
    assert state_bytes(run, LAST) != state_bytes(run, MIDDLE)


def test_ranks_and_stages_share_one_loss(bench: Bench, taught: dict[str, Outcome]) -> None:
    """In fp32 but for the order of sums; in bf16 as near as its eight bits."""
    expected = metrics(bench.folder / "taught-one")
    for kind, tolerance in (("two", FP32_SUMS), ("zero3", FP32_SUMS), ("bf16", 0.02), ("zero3-bf16", 0.02)):
        found = metrics(bench.folder / f"taught-{kind}")
        for key in ("loss", "grad_norm"):
            ours, theirs = ([line[key] for line in lines] for lines in (found, expected))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=f"{kind} {key}")


def test_the_weights_are_those_of_one_rank(bench: Bench, taught: dict[str, Outcome]) -> None:
    weights = [
        load_file(bench.folder / f"taught-{kind}" / "checkpoints" / f"global_step{LAST}" / "model.safetensors")
        for kind in ("one", "two", "zero3")
    ]
    for key, value in weights[0].items():
        for kind, other in zip(("two", "zero3"), weights[1:], strict=True):
            np.testing.assert_allclose(other[key], value, atol=5e-6, err_msg=f"{kind} {key}")


def test_the_teacher_counts(bench: Bench, taught: dict[str, Outcome]) -> None:
    """Its weights are not among what is trained, and without it the loss is another."""
    assert not list((bench.folder / "taught-two").rglob("*teacher*"))
    alone, helped = (losses(bench.folder / f"taught-{name}")[0] for name in ("none", "one"))
    assert alone != pytest.approx(helped, rel=1e-3)
