"""SubEmbedding: lookups, logits and exact top-k against the dense matrix it stands for."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds import CodeTable, SubEmbedding, factorized_cross_entropy, plain_codes, positional_codes
from ksub_ds.contraction import beam_search
from ksub_ds.model.softmax import log_partition


def layer_of(table, dim=20, seed=0):
    torch.manual_seed(seed)
    layer = SubEmbedding(table, dim)
    layer.reset_parameters(std=1.0)
    return layer


def test_the_tables_are_the_parameters():
    layer = SubEmbedding(positional_codes(250002, 3), 512)
    assert [tuple(p.shape) for p in layer.parameters()] == [(63, 171), (63, 171), (63, 170)]
    assert sum(p.numel() for p in layer.parameters()) == 32_256
    assert [name for name, _ in layer.named_buffers()] == ["codes"] and layer.codes.dtype == torch.int32
    assert layer.double().codes.dtype == torch.int32 and layer.bfloat16().codes.dtype == torch.int32


@pytest.mark.parametrize("num_tables", [1, 2, 3, 7])
def test_lookup_is_a_row_of_the_dense_weight(num_tables):
    layer = layer_of(positional_codes(300, num_tables), padding_dim := 23)
    ids = torch.randint(300, (4, 5))
    dense = layer.dense_weight()
    assert dense.shape == (300, padding_dim)
    assert torch.equal(layer(ids), dense[ids])
    assert torch.equal(layer(ids.int()), dense[ids])


@pytest.mark.parametrize(("num_tables", "most"), [(1, 5), (3, 2), (8, 9), (8, 200), (23, 9), (23, 60), (8, 300)])
def test_codes_for_the_input_are_read_as_any_and_have_no_logits(num_tables, most):
    """Packed in 1 to 9 bits; tables of one shape are looked up together: the same rows and gradients as one by one."""
    draw = np.random.default_rng(0)
    sizes = (min(5, most), *[most] * (num_tables - 1))
    table = CodeTable(draw.integers(0, sizes, (300, num_tables)), sizes, unique=False)
    layer = layer_of(table, 23)
    assert layer.codes.dtype == (torch.uint8 if most <= 256 else torch.int32) and not layer.code_table().unique
    assert (layer.code_table().codes == table.codes).all()
    ids = torch.randint(300, (4, 5))
    one_by_one = [part[table.codes[ids.numpy(), k]] for k, part in enumerate(layer.tables)]
    assert torch.equal(layer(ids), torch.cat(one_by_one, dim=-1))
    assert torch.equal(layer.dense_weight()[ids], layer(ids))
    weights = torch.randn(4, 5, 23)
    ours = torch.autograd.grad((layer(ids) * weights).sum(), list(layer.tables))
    theirs = torch.autograd.grad((torch.cat(one_by_one, dim=-1) * weights).sum(), list(layer.tables))
    torch.testing.assert_close(ours, theirs)
    hidden = torch.randn(2, 23)
    asked = (
        lambda: layer.logits(hidden),
        lambda: layer.most_probable(hidden),
        lambda: factorized_cross_entropy(hidden, layer, torch.tensor([0, 1])),
    )
    for ask in asked:
        with pytest.raises(ValueError, match="none can be predicted; compress without --input-only"):
            ask()


def test_plain_codes_are_nn_embedding():
    layer = layer_of(plain_codes(50))
    plain = torch.nn.Embedding(50, 20)
    plain.weight = torch.nn.Parameter(layer.tables[0].detach().clone())
    ids = torch.tensor([[3, 3, 49], [0, 1, 3]])
    assert torch.equal(layer(ids), plain(ids))
    layer(ids).square().sum().backward()
    plain(ids).square().sum().backward()
    assert torch.equal(layer.tables[0].grad, plain.weight.grad)


def test_a_negative_padding_counts_from_the_end():
    assert SubEmbedding(positional_codes(27, 3), 12, padding_idx=-1).padding_idx == 26


def test_padding_sends_no_gradient():
    table = positional_codes(27, 3)
    layer = SubEmbedding(table, 12, padding_idx=1)
    assert torch.equal(layer(torch.arange(27)), layer.dense_weight())
    layer(torch.tensor([1, 1, 5])).sum().backward()
    with_padding = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(torch.tensor([5])).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(with_padding, layer.parameters(), strict=True))


@pytest.mark.parametrize("num_tables", [1, 3])
def test_logits_are_the_dense_ones(num_tables):
    layer = layer_of(positional_codes(200, num_tables)).double()
    hidden, bias = torch.randn(3, 4, 20).double(), torch.randn(200).double()
    torch.testing.assert_close(layer.logits(hidden, bias), hidden @ layer.dense_weight().T + bias)
    torch.testing.assert_close(layer.logits(hidden), hidden @ layer.dense_weight().T)


def check_topk(layer, hidden, k, bias):
    logits, ids = layer.predict_topk(hidden, k, bias)
    wanted = layer.logits(hidden, bias)
    best = wanted.topk(k, dim=1).values
    torch.testing.assert_close(logits, best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wanted.gather(1, ids), best, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("num_tables", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 5, 400])
def test_topk_is_exact(num_tables, k):
    layer = layer_of(positional_codes(400, num_tables))
    check_topk(layer, torch.randn(9, 20), k, torch.randn(400))
    check_topk(layer, torch.randn(9, 20), k, None)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_topk_over_any_codes_with_a_narrow_beam(sizes, seed, data):
    """A beam of one or two: the proof fails often, and the search widens until it holds."""
    space = int(np.prod(sizes))
    count = data.draw(st.integers(1, space))
    chosen = np.random.default_rng(seed).choice(space, count, replace=False)
    layer = layer_of(CodeTable(np.stack(np.unravel_index(chosen, sizes), axis=1), sizes), dim=8, seed=seed)
    patch = pytest.MonkeyPatch()
    patch.setattr(beam_search, "FIRST_BEAM", 1)
    patch.setattr(beam_search, "WIDER", 2)
    with patch.context():
        bias = torch.randn(count) * data.draw(st.sampled_from([0.0, 1.0, 50.0]))
        check_topk(layer, torch.randn(5, 8), data.draw(st.integers(1, min(count, 6))), bias)
    patch.undo()


def test_topk_refuses_an_impossible_k():
    layer = layer_of(positional_codes(20, 2))
    for k in (0, 21):
        with pytest.raises(ValueError, match=r"1\.\.20"):
            layer.predict_topk(torch.randn(2, 20), k)


def test_what_follows_from_the_codes_follows_a_change_of_them():
    layer, other = layer_of(positional_codes(60, 2)), layer_of(CodeTable(positional_codes(60, 2).codes[::-1], (8, 8)))
    hidden = torch.randn(4, 20)
    layer.predict_topk(hidden, 3)
    layer.load_state_dict(other.state_dict())
    check_topk(layer, hidden, 3, None)
    check_topk(copy.deepcopy(layer), hidden, 3, None)


def test_topk_ends_when_there_is_nothing_to_prove():
    """NaN rows, and fewer allowed tokens than asked for."""
    layer = layer_of(positional_codes(20_000, 3))
    bias = torch.full((20_000,), -torch.inf)
    bias[[5, 70, 19_000]] = 0.0
    logits, ids = layer.predict_topk(torch.randn(4, 20), 5, bias)
    assert (logits.isfinite().sum(dim=1) == 3).all()
    assert [set(row[:3]) for row in ids.tolist()] == [{5, 70, 19_000}] * 4
    hidden = torch.randn(3, 20)
    hidden[1] = torch.nan
    logits, _ = layer.predict_topk(hidden, 2)
    assert logits[[0, 2]].isfinite().all() and logits[1].isnan().all()


def test_copies_and_pickles_after_use():
    layer = layer_of(positional_codes(500, 3, special_ids=range(5)))
    hidden, bias = torch.randn(3, 20), torch.randn(500)
    wanted = factorized_cross_entropy(hidden, layer, torch.tensor([1, 2, 3]), bias)
    layer.predict_topk(hidden, 2, bias)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert factorized_cross_entropy(hidden, twin, torch.tensor([1, 2, 3]), bias) == wanted


def test_codes_loaded_at_the_address_of_older_ones():
    layer, hidden, labels = layer_of(positional_codes(60, 2)), torch.randn(4, 20), torch.tensor([0, 1, 2, 3])
    for seed in range(6):
        codes = np.random.default_rng(seed).permutation(positional_codes(60, 2).codes)
        layer.load_state_dict(layer_of(CodeTable(codes, (8, 8)), seed=seed).state_dict(), assign=True)
        wanted = torch.nn.functional.cross_entropy(layer.logits(hidden), labels)
        torch.testing.assert_close(factorized_cross_entropy(hidden, layer, labels), wanted)


def test_ids_out_of_range_are_refused():
    layer = layer_of(positional_codes(60, 2))
    for wrong in (-1, 60):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))


def test_built_and_used_in_inference_mode():
    with torch.inference_mode():
        layer = layer_of(positional_codes(60, 2))
        check_topk(layer, torch.randn(4, 20), 3, None)


def test_code_table_comes_back():
    table = positional_codes(60, 2)
    assert SubEmbedding(table, 8).code_table().sha256 == table.sha256


@pytest.mark.parametrize("num_tables", [1, 3])
def test_a_mixing_matrix_is_part_of_the_embedding_everywhere(num_tables):
    """Lookup, logits, loss with gradients, and top k against the dense matrix tables x A^T."""
    torch.manual_seed(3)
    layer = SubEmbedding(positional_codes(200, num_tables), 20, mixing=True)
    layer.reset_parameters(std=0.5)
    assert [name for name, _ in layer.named_buffers()] == ["codes", "mixing"]
    plain = SubEmbedding(positional_codes(200, num_tables), 20)
    plain.load_state_dict(layer.state_dict(), strict=False)
    layer.mixing.copy_(torch.randn(20, 20) / 4)
    dense = plain.dense_weight() @ layer.mixing.T
    torch.testing.assert_close(layer.dense_weight(), dense)
    ids = torch.randint(200, (4, 5))
    torch.testing.assert_close(layer(ids), dense[ids])
    hidden, bias = torch.randn(6, 20, requires_grad=True), torch.randn(200)
    torch.testing.assert_close(layer.logits(hidden, bias), hidden @ dense.T + bias)
    check_topk(layer, hidden.detach(), 5, bias)
    labels = torch.randint(200, (6,))
    ours = factorized_cross_entropy(hidden, layer, labels, bias)
    theirs = torch.nn.functional.cross_entropy(hidden @ layer.dense_weight().T + bias, labels)
    torch.testing.assert_close(ours, theirs)
    inputs = [hidden, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixing_matrix_leaves_the_sum_exact_for_rounded_rows(dtype):
    """log Z is that of the rows as they are; probabilities of all tokens add up to 1."""
    layer = SubEmbedding(positional_codes(200, 3), 20, mixing=True)
    layer.reset_parameters(std=1.0)
    layer.mixing.copy_(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)) / 4)
    layer.to(dtype)
    hidden = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = copy.deepcopy(layer).double()
    wanted = (hidden.double() @ exact.dense_weight().T).logsumexp(dim=1)
    torch.testing.assert_close(log_partition(hidden, layer), wanted, rtol=1e-6, atol=1e-6)
    logits, _ = layer.predict_topk(hidden, 200)
    torch.testing.assert_close(logits.double().logsumexp(dim=1), wanted, rtol=1e-6, atol=1e-6)
    assert layer.logits(hidden).dtype == dtype


def test_autocast_rounds_no_vector_of_the_input():
    """Each layer of a Llama adds to it: in bf16 the whole stream of residuals would stay so."""
    layer = SubEmbedding(positional_codes(200, 3), 20, mixing=True)
    layer.mixing.copy_(torch.randn(20, 20) / 4)
    ids = torch.arange(200)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = layer(ids)
    assert embedded.dtype == torch.float32 and torch.equal(embedded, layer(ids))
    assert layer.to("meta")(ids.to("meta")).shape == (200, 20)


def dedicated_layer(table, ids, dim=20, **keywords):
    """A layer whose dedicated rows are not zero, and the one without them with the same tables."""
    plain = SubEmbedding(table, dim, **keywords)
    layer = SubEmbedding(CodeTable(table.codes, table.table_sizes, dedicated=ids), dim, **keywords)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["dedicated_rows", "dedicated"] and not unexpected
    if layer.mixing is not None:
        for each in (plain, layer):
            each.mixing.copy_(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) / 4)
    return layer, plain


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("ids", [[0], [3, 8, 59], list(range(60))])
def test_dedicated_rows_are_added_at_the_input_and_in_the_logits(ids, mixing):
    layer, plain = dedicated_layer(positional_codes(60, 3), ids, padding_idx=3, mixing=mixing)
    tokens, hidden, bias = torch.arange(60), torch.randn(5, 20), torch.randn(60)
    assert torch.equal(layer(tokens), plain(tokens))  # the new rows are zero: nothing changes
    assert torch.equal(layer.logits(hidden, bias), plain.logits(hidden, bias))
    with torch.no_grad():
        layer.dedicated_rows.normal_()
    wanted = plain.dense_weight().detach().clone()
    wanted[ids] += layer.dedicated_rows
    torch.testing.assert_close(layer.dense_weight(), wanted)
    torch.testing.assert_close(layer(tokens.int().view(6, 10)), wanted.view(6, 10, 20))
    torch.testing.assert_close(layer.dedicated_weight(), wanted[ids])
    torch.testing.assert_close(layer.logits(hidden, bias), hidden @ wanted.T + bias)
    layer.reset_parameters()
    assert not layer.dedicated_rows.any() and f"dedicated={len(ids)}" in repr(layer)


def test_dedicated_rows_have_the_gradients_of_the_dense_matrix():
    layer, _ = dedicated_layer(positional_codes(60, 3), [1, 3, 8, 59], padding_idx=3)
    ids, weight = torch.tensor([[0, 1, 3], [8, 8, 59]]), torch.randn(2, 3, 20)
    inputs = [layer.dedicated_rows, *layer.tables]
    ours = torch.autograd.grad((layer(ids) * weight).sum(), inputs)
    kept = (ids != 3).unsqueeze(-1)
    theirs = torch.autograd.grad((layer.dense_weight()[ids] * weight * kept).sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    assert ours[0].any(dim=1).tolist() == [True, False, True, True]


def test_dedicated_tokens_are_stored_and_come_back():
    layer, _ = dedicated_layer(positional_codes(60, 3), [3, 8, 59])
    assert {name for name, _ in layer.named_parameters()} == {"tables.0", "tables.1", "tables.2", "dedicated_rows"}
    assert [name for name, _ in layer.named_buffers()] == ["codes", "dedicated"]
    assert layer.code_table().dedicated.tolist() == [3, 8, 59]
    other, _ = dedicated_layer(positional_codes(60, 3), [0, 1, 2])
    with torch.no_grad():
        layer.dedicated_rows.normal_()
    other.load_state_dict(layer.state_dict())
    assert other.code_table().sha256 == layer.code_table().sha256
    assert torch.equal(other(torch.arange(60)), layer(torch.arange(60)))
