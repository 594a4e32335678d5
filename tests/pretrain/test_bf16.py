"""--precision bf16: products in bf16, weights, bias, gradients and loss in fp32, on every ZeRO stage."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.pretrain.engine import compute_in_bf16

from .runs import Bench, Outcome, losses

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
N = 300
FP32_SUMS = 2e-5  # as in test_repeatability
BF16_SUMS = 1e-3  # stage 3 adds a layer's bias to a product that is rounded to eight bits already


def model() -> KSubRobertaForMaskedLM:
    torch.manual_seed(0)
    made = KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=N), positional_codes(N, 3)).eval()
    with torch.no_grad():
        made.decoder_bias.copy_(torch.linspace(-16, -8, N))  # log frequencies: bf16 would round them to 1/16
    return made


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, N, (2, 16), generator=generator)
    places = torch.randperm(32, generator=generator)[:8]
    return {"input_ids": ids, "masked_positions": places, "targets": ids.flatten()[places]}


def test_the_loss_is_exact_for_rounded_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head computes in bf16, tables and bias are taken as they are: the reference is dense, in float64."""
    seen: list[torch.Tensor] = []
    head = KSubRobertaForMaskedLM._decoder_input

    def watched(self: KSubRobertaForMaskedLM, states: torch.Tensor) -> torch.Tensor:
        seen.append(head(self, states))
        return seen[-1]

    monkeypatch.setattr(KSubRobertaForMaskedLM, "_decoder_input", watched)
    plain, rounded = model(), model()
    compute_in_bf16(rounded)
    inputs = batch(1)
    exact = plain(**inputs).loss
    output = rounded(**inputs, output_correct=True)
    assert output.loss.dtype == torch.float32 and output.loss != exact
    torch.testing.assert_close(output.loss, exact, rtol=5e-3, atol=0)
    dense = plain.get_input_embeddings().dense_weight().double()
    logits = seen[-1].double() @ dense.t() + plain.decoder_bias.double()
    torch.testing.assert_close(output.loss.double(), F.cross_entropy(logits, inputs["targets"]), rtol=1e-6, atol=0)
    assert int(output["correct"]) == int((logits.argmax(1) == inputs["targets"]).sum())


def test_gradients_add_up_over_micro_batches() -> None:
    """Weights, their gradients and what autocast keeps of them between two micro-batches."""
    alone = []
    for seed in (1, 2):
        one = model()
        compute_in_bf16(one)
        one(**batch(seed), loss_reduction="sum").loss.backward()
        alone.append([parameter.grad for parameter in one.parameters()])
    both = model()
    compute_in_bf16(both)
    for seed in (1, 2):
        both(**batch(seed), loss_reduction="sum").loss.backward()
        assert not torch.is_autocast_enabled("cpu")
    for parameter, *parts in zip(both.parameters(), *alone, strict=True):
        assert parameter.dtype == torch.float32
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, parts[0] + parts[1])


@pytest.fixture(scope="module")
def runs(bench: Bench) -> dict[str, Outcome]:
    settings = {"max_steps": 4, "save_every_steps": 4, "eval_every": 4, "eval_sequences": 2}
    stages = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
    recipes = {f"bf16-{stage}": {"precision": "bf16", "deepspeed": stage} for stage in stages}
    recipes = {"fp32-zero1": {}} | recipes
    entries = [{"arguments": bench.arguments(name, **settings, **more)} for name, more in recipes.items()]
    return dict(zip(recipes, bench.run_all(1, entries), strict=True))


def test_every_stage_trains_alike(bench: Bench, runs: dict[str, Outcome]) -> None:
    assert all(outcome == [0] for outcome in runs.values()), runs
    expected, exact = losses(bench.folder / "bf16-zero1"), losses(bench.folder / "fp32-zero1")
    assert expected != exact
    np.testing.assert_allclose(expected, exact, rtol=5e-3)
    for stage, tolerance in (
        ("zero0", FP32_SUMS),
        ("zero2", FP32_SUMS),
        ("zero3", BF16_SUMS),
        ("zero3_offload", BF16_SUMS),
    ):
        found = losses(bench.folder / f"bf16-{stage}")
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=stage)
        assert found != exact


def test_what_is_saved_is_not_rounded(bench: Bench, runs: dict[str, Outcome]) -> None:
    path: Path = bench.folder / "bf16-zero0" / "checkpoints" / "global_step4" / "model.safetensors"
    for key, value in load_file(path).items():
        rounded = torch.from_numpy(value).bfloat16().float().numpy()
        assert value.dtype == np.float32
        assert not np.array_equal(value, rounded) or not value.any() or (value == 1).all(), key
