"""Products of a dense block by bf16 parts: how close they are, also where tensor cores cut off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.contraction import dense_block
from ksub_ds.contraction.dense_block import multiply, pairs, product, split


def test_small_products_come_first_and_all_that_matter_are_there():
    assert pairs(2) == [(0, 1), (1, 0), (0, 0)]
    assert pairs(3) == [(0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0)]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.integers(-20, 20), st.integers(0, 99),
    st.sampled_from([(2, 3 * 2.0**-16), (3, 2.0**-22)]), st.integers(1, 50),
)  # fmt: skip
def test_products_are_within_their_bound(rows, terms, columns, exponent, seed, parts_and_bound, longest):
    parts, bound = parts_and_bound
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, terms, generator=generator) * 2.0**exponent
    right = torch.randn(terms, columns, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_block, "LONGEST_SUM", longest)
        found = product(split(left, parts), split(right, parts))
    assert found.dtype == torch.float32
    error = (found.double() - left.double() @ right.double()).abs()
    assert (error <= bound * (left.double().abs() @ right.double().abs())).all()


def cut_off(values):
    """Round float64 numbers to float32 towards zero."""
    rounded = values.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(values), np.nextafter(rounded, np.float32(0)), rounded)


def tensor_core(left, right):
    """Add up 16 terms at a time, and cut off where they are added to the sum so far."""
    left, right = left.double().numpy(), right.double().numpy()
    total = np.zeros((*left.shape[:-1], right.shape[-1]), dtype=np.float32)
    for start in range(0, left.shape[-1], 16):
        step = left[..., start : start + 16] @ right[..., start : start + 16, :]
        total = cut_off(total.astype(np.float64) + step)
    return torch.from_numpy(total)


def test_long_sums_of_one_sign_are_not_cut_off(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(3, 20_000, generator=generator), torch.rand(20_000, 2, generator=generator)
    exact = left.double() @ right.double()
    monkeypatch.setattr(dense_block, "multiply", tensor_core)

    def error():
        found = product(split(left), split(right))
        return ((found.double() - exact).abs() / exact).max().item()

    assert error() < 5e-6
    monkeypatch.setattr(dense_block, "LONGEST_SUM", 10**6)
    assert error() > 1e-5  # as it would be without pieces


def test_batches_are_multiplied_one_by_one():
    left, right = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4, 5).bfloat16()
    assert torch.equal(multiply(left, right)[1], multiply(left[1], right[1]))
