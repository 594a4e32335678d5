"""The most probable token by the fold in max-plus, against dense float64 logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ksub_ds import CodeTable, SubEmbedding, plain_codes, positional_codes
from ksub_ds.contraction import max_plus


def layer_of(table, seed=0, dim=16):
    torch.manual_seed(seed)
    layer = SubEmbedding(table, dim)
    layer.reset_parameters(std=1.0)
    return layer


def unbalanced_codes(num_tokens, seed=0):
    """Leaves of 1 to 60 tokens."""
    generator = np.random.default_rng(seed)
    leaf = np.minimum(generator.zipf(1.3, num_tokens), 200) - 1
    order = np.argsort(leaf, kind="stable")
    sizes = np.bincount(leaf, minlength=200)
    last = np.empty(num_tokens, dtype=np.int64)
    last[order] = np.arange(num_tokens) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return CodeTable(np.stack([leaf // 10, leaf % 10, last], axis=1), (20, 10, int(sizes.max())))


def check(layer, hidden, bias):
    """The id is that of the dense maximum, wherever another token is not within rounding of it."""
    logits, ids = layer.most_probable(hidden, bias)
    dense = hidden.double() @ layer.dense_weight().detach().double().T
    dense = dense if bias is None else dense + bias.double()
    best = dense.max(dim=1).values
    rounding = 1e-5 * (1 + best.abs())
    assert logits.shape == ids.shape == best.shape and logits.dtype == torch.float32 and ids.dtype == torch.int64
    assert ((logits - best).abs() <= rounding).all()
    assert (best - dense.gather(1, ids.unsqueeze(1)).squeeze(1) <= rounding).all()
    if layer.num_embeddings > 1:
        clear = best - dense.topk(2, dim=1).values[:, 1] > rounding
        assert torch.equal(ids[clear], dense.argmax(dim=1)[clear])
    return ids


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(0, 99), st.data())
def test_any_codes_and_any_bias(sizes, seed, data):
    space = int(np.prod(sizes))
    count = data.draw(st.integers(1, min(space, 400)))
    chosen = np.random.default_rng(seed).choice(space, count, replace=False)
    layer = layer_of(CodeTable(np.stack(np.unravel_index(chosen, sizes), axis=1), sizes), seed)
    rows = data.draw(st.integers(0, 9))
    bias = torch.randn(count) * data.draw(st.sampled_from([0.0, 1.0, 50.0]))
    bias[torch.rand(count) < data.draw(st.sampled_from([0.0, 0.5]))] = -1e30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(max_plus, "VALUES_PER_BLOCK", {"cpu": data.draw(st.sampled_from([1, 200, 2**20]))})
        for each in (bias, None):
            check(layer, torch.randn(rows, 16), each)


TABLES = {
    "plain": plain_codes(700),
    **{f"positional {k}": positional_codes(1000, k) for k in range(1, 9)},
    "reserved": positional_codes(1000, 3, special_ids=range(5)),
    "unbalanced": unbalanced_codes(900),
    "full": CodeTable(np.random.default_rng(0).permutation(positional_codes(10**3, 3).codes), (10, 10, 10)),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_codes_in_blocks_of_any_size(name, with_bias, monkeypatch):
    table = TABLES[name]
    hidden = torch.randn(33, 16, generator=torch.Generator().manual_seed(3))
    bias = -torch.log(torch.randperm(table.num_tokens) + 1.0) if with_bias else None
    ids = check(layer_of(table), hidden, bias)
    assert torch.equal(check(layer_of(table), hidden, bias), ids), "the same on every run"
    monkeypatch.setattr(max_plus, "VALUES_PER_BLOCK", {"cpu": 1})
    layer = layer_of(table)
    fold = layer.structure.best_weighted if with_bias else layer.structure.best_unweighted
    assert fold.rows_per_block == 1
    assert torch.equal(check(layer, hidden, bias), ids)


def test_the_top_one_is_the_most_probable():
    layer, hidden, bias = layer_of(TABLES["unbalanced"]), torch.randn(20, 16), torch.randn(900)
    logits, ids = layer.predict_topk(hidden, 1, bias)
    assert torch.equal(ids.squeeze(1), check(layer, hidden, bias)) and logits.shape == (20, 1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_of_equal_tokens_the_first_in_the_order_of_the_codes(name, with_bias):
    layer = layer_of(TABLES[name])
    with torch.no_grad():
        for table in layer.tables:
            table.zero_()
    bias = torch.zeros(layer.num_embeddings) if with_bias else None
    _, ids = layer.most_probable(torch.randn(5, 16), bias)
    assert ids.tolist() == [int(np.lexsort(TABLES[name].codes.T[::-1])[0])] * 5


def test_numbers_that_are_none():
    """A row of NaN changes no other row, and a bias that forbids tokens forbids them."""
    layer, bias = layer_of(TABLES["unbalanced"]), torch.randn(900)
    hidden = torch.randn(4, 16)
    wanted = check(layer, hidden, bias)
    hidden[1] = torch.nan
    logits, ids = layer.most_probable(hidden, bias)
    assert torch.equal(ids[[0, 2, 3]], wanted[[0, 2, 3]])
    assert logits.isnan().tolist() == [False, True, False, False] and 0 <= ids[1] < 900
    only = torch.full((900,), -torch.inf)
    only[417] = 0.0
    assert layer.most_probable(torch.randn(3, 16), only)[1].tolist() == [417] * 3
    logits, ids = layer.most_probable(torch.randn(3, 16), torch.full((900,), -torch.inf))
    assert (logits == -torch.inf).all() and ((ids >= 0) & (ids < 900)).all()


def test_without_a_bias_positional_codes_cost_their_digits():
    """2·K·M numbers a row rather than N."""
    fold = layer_of(positional_codes(250_002, 3)).structure.best_unweighted
    gathered = sum(segments.code.numel() for level in fold._levels for segments in level.segments)
    assert gathered <= 2 * 3 * 63


@pytest.mark.parametrize("name", ["plain", "positional 3", "unbalanced"])
def test_the_device_is_never_asked_for_a_number(name):
    """Fake tensors have shapes and no values: whatever reads one raises."""
    layer, bias = layer_of(TABLES[name]), torch.randn(TABLES[name].num_tokens)
    for build in (layer.most_probable, lambda *given: layer.predict_topk(given[0], 2, given[1])):
        build(torch.randn(2, 16), bias), build(torch.randn(2, 16), None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.randn(50, 16)
        for each in (bias, None):
            logits, ids = layer.most_probable(hidden, each)
            assert logits.shape == ids.shape == (50,)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):  # the search asks
            layer.predict_topk(hidden, 2, bias)
