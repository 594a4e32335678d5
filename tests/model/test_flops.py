"""Operations of a token: those that torch counts in a real forward and backward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ksub_ds import positional_codes
from ksub_ds.model.flops import training_flops
from ksub_ds.model.presets import fresh_model, preset_config

TABLE = positional_codes(500, 3)


@pytest.mark.parametrize(("preset", "length"), [("tiny", 48), ("small_modernbert", 48)])
def test_encoder_against_torch_s_counter(preset: str, length: int) -> None:
    model = fresh_model(preset_config(preset, vocab_size=500), TABLE)
    model.set_attn_implementation("eager")
    inputs = torch.randint(5, 500, (2, length))
    with FlopCounterMode(display=False) as counter:
        model.base_model(inputs).last_hidden_state.sum().backward()
    counted = counter.get_total_flops() / inputs.numel()
    assert training_flops(model, length, 0.0) == pytest.approx(counted, rel=1e-12)


def test_xlmr_medium_needs_178_million() -> None:
    """151.0 of weights, 25.2 of attention, 0.2 of the head; 2 more for the loss, which depends on the codes."""
    with torch.device("meta"):
        model = fresh_model(preset_config("xlmr_medium", vocab_size=250_002), positional_codes(250_002, 3))
    weights, attention = 6 * 8 * (4 * 512**2 + 2 * 512 * 2048), 3 * 4 * 8 * 512 * 512
    head = 0.15 * 6 * (512**2 + sum(rows * width for rows, width in zip((63,) * 3, (171, 171, 170), strict=True)))
    assert training_flops(model, 512, 0.15) == pytest.approx(weights + attention + head)
    assert training_flops(model, 512, 0.15) == pytest.approx(178e6, rel=0.01)


def test_local_attention_sees_its_window() -> None:
    model = fresh_model(preset_config("small_modernbert", vocab_size=500), TABLE)
    short, long = (training_flops(model, length, 0.0) for length in (129, 512))
    assert long - short == 3 * 4 * 384 * 2 * (512 - 129), "two of six layers see the whole row"


def test_a_causal_model_sees_what_comes_before() -> None:
    """The eager attention that torch counts multiplies whole rows; a token needs the half before it, and itself."""
    model = fresh_model(preset_config("llama_tiny", vocab_size=500), TABLE)
    model.set_attn_implementation("eager")
    inputs = torch.randint(5, 500, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model.base_model(inputs).last_hidden_state.sum().backward()
    unseen = 3 * 4 * 128 * 2 * (48 - 24.5)
    assert training_flops(model, 48, 0.0) == pytest.approx(counter.get_total_flops() / inputs.numel() - unseen)
