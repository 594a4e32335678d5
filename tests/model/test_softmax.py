"""The exact factorised loss against dense float64 logits: values, gradients, and where it is hard."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksub_ds import factorized_cross_entropy, plain_codes, positional_codes
from ksub_ds.contraction import dense_block
from ksub_ds.contraction.dense_block import multiply
from ksub_ds.model import softmax
from ksub_ds.model.softmax import log_partition

from .loss_case import Case, any_table, dedicated, gradients, maxima_that_meet_nowhere, random_codes, relative


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tables", range(1, 9))
def test_positional_codes_of_every_k(num_tables, with_bias):
    Case(positional_codes(1000, num_tables), with_bias=with_bias).check()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [7**3, 7**3 - 1, 7**3 + 1, 6**3 + 1, 1, 2])
def test_edges_of_the_digits(count, with_bias):
    Case(positional_codes(count, 3), with_bias=with_bias).check()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0, 1000.0, 5000.0])
@pytest.mark.parametrize("num_tables", [1, 3])
def test_large_logits(num_tables, scale, with_bias):
    case = Case(positional_codes(1500, num_tables), scale=scale, with_bias=with_bias)
    case.check(gradient_limit=1e-4 if scale >= 1000 else 5e-6)


@settings(deadline=None, max_examples=60)
@given(any_table(), st.booleans(), st.integers(1, 9), st.integers(5, 17))
def test_any_code_table(table, with_bias, rows, dim):
    Case(table, rows=rows, dim=dim, with_bias=with_bias).check()


@pytest.mark.parametrize("gap", [30, 60, 80, 90, 95, 100, 104, 110, 120, 800])
@pytest.mark.parametrize("with_bias", [False, True])
def test_maxima_that_meet_in_no_token(gap, with_bias):
    """Every table has a favourite code, but no token has all of them: Z loses exp(gap), and must not."""
    maxima_that_meet_nowhere(gap, with_bias).check()


def test_the_underflow_path_is_taken_only_when_needed(monkeypatch):
    case = Case(positional_codes(300, 3))
    monkeypatch.setattr(softmax._TrieLoss, "_dense_fallback", lambda *_: pytest.fail("no row underflows here"))
    case.ours()


def test_blocks_of_rows_change_nothing(monkeypatch):
    case = Case(positional_codes(1000, 3), rows=101)
    whole, exact = case.ours()
    monkeypatch.setattr(softmax, "FEWEST_ROWS", 7)
    monkeypatch.setattr(softmax, "BLOCK_NUMBERS", {"cpu": 1})
    blocked, ours = case.ours()
    assert abs(whole - blocked) <= 1e-6 * whole
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b.double()) < 1e-6


def test_rows_that_are_ignored():
    case = Case(positional_codes(50, 2))
    case.labels.fill_(-100)
    total = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias, reduction="sum")
    assert total.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(total, case.tensors()))
    assert factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias).isnan()  # as F.cross_entropy
    case.labels[3] = 7
    one = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias)
    alone = factorized_cross_entropy(case.hidden[3:4], case.layer, case.labels[3:4], case.bias)
    assert one.item() == alone.item()
    other = torch.where(case.labels == -100, 12345, case.labels)
    assert factorized_cross_entropy(case.hidden, case.layer, other, case.bias, ignore_index=12345).item() == one.item()


def test_leading_dimensions_and_sum():
    case = Case(positional_codes(50, 2), rows=12)
    flat = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias, reduction="sum")
    shaped = factorized_cross_entropy(
        case.hidden.view(3, 4, -1), case.layer, case.labels.view(3, 4), case.bias, reduction="sum"
    )
    assert flat.item() == shaped.item()
    mean = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias)
    assert mean.item() == pytest.approx(flat.item() / (case.labels != -100).sum().item(), rel=1e-6)


def test_wrong_arguments():
    case = Case(positional_codes(50, 2))
    call = factorized_cross_entropy
    with pytest.raises(ValueError, match="reduction must be"):
        call(case.hidden, case.layer, case.labels, reduction="none")
    with pytest.raises(ValueError, match="hidden"):
        call(case.hidden[:, 1:], case.layer, case.labels)
    with pytest.raises(ValueError, match="bias must be"):
        call(case.hidden, case.layer, case.labels, case.bias[1:])
    with pytest.raises(ValueError, match="labels must be"):
        call(case.hidden, case.layer, torch.full_like(case.labels, 50))
    with pytest.raises(ValueError, match=r"labels must be token ids, not of torch\.bool"):
        call(case.hidden, case.layer, case.labels > 20)


@pytest.mark.parametrize("table", [plain_codes(50), positional_codes(50, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integers(table, dtype):
    case = Case(table)
    labels = case.labels.clamp(min=0)
    loss = factorized_cross_entropy(case.hidden, case.layer, labels.to(dtype), case.bias)
    assert loss == factorized_cross_entropy(case.hidden, case.layer, labels, case.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    """The loss of rounded inputs is as exact as that of float32 inputs; gradients come back in their type."""
    case = Case(positional_codes(2000, 3))
    case.layer.to(dtype)
    case.hidden = case.hidden.detach().to(dtype).requires_grad_()
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    assert abs(loss.double() - reference) <= 5e-6 * abs(reference)
    for mine, wanted in zip(ours, exact, strict=True):
        assert relative(mine, wanted) <= (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert [gradient.dtype for gradient in ours] == [dtype] * 4 + [torch.float32]


@pytest.mark.parametrize("special", [(), range(5)])
def test_autocast_changes_nothing(special):
    """The rest of a model may run in bf16; the sums stay float32, in every form of leaves and levels."""
    case = Case(positional_codes(900, 3, special_ids=special))
    loss, exact = case.ours()
    with torch.autocast("cpu", torch.bfloat16):
        again, ours = case.ours()
        log_total = log_partition(case.hidden, case.layer, case.bias)
        logits, _ = case.layer.predict_topk(case.hidden, 3, case.bias)
    assert again == loss and all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    assert torch.equal(log_total, log_partition(case.hidden, case.layer, case.bias)) and logits.dtype == torch.float32


def test_only_wanted_gradients_are_made():
    case = Case(positional_codes(100, 2))
    frozen = case.bias.detach()
    for table in case.layer.tables:
        table.requires_grad_(False)
    loss = factorized_cross_entropy(case.hidden, case.layer, case.labels, frozen)
    loss.backward()
    assert case.hidden.grad is not None and case.layer.tables[0].grad is None
    with torch.no_grad():
        assert not factorized_cross_entropy(case.hidden, case.layer, case.labels, frozen).requires_grad


def test_plain_codes_are_the_plain_decoder():
    case = Case(plain_codes(400))
    logits = F.linear(case.hidden, case.layer.tables[0], case.bias)
    assert torch.equal(case.layer.logits(case.hidden, case.bias), logits)
    case.check()


@pytest.mark.parametrize("with_bias", [False, True])
def test_log_partition(with_bias):
    case = Case(random_codes(500, (10, 11, 12)), with_bias=with_bias)
    wanted = case.layer.double().logits(case.hidden.double(), case.bias).logsumexp(dim=1)
    ours = log_partition(case.hidden, case.layer, case.bias)
    assert ((ours - wanted).abs() < 1e-6 * wanted.abs().clamp_min(1)).all()


def test_no_tensor_is_as_wide_as_rows_times_tokens():
    """The largest tensor made in a pass stays far under B x N and N x d."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    rows, dim = 600, 96
    case = Case(random_codes(50_000, (40, 40, 40)), rows=rows, dim=dim)
    _ = case.layer.structure.weighted  # built once, and large
    with Largest() as largest:
        case.ours()
    assert largest.numbers <= 2**21 < min(rows * 50_000, 50_000 * dim)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("table", "count"),
    [
        (positional_codes(900, 3), 0),
        (positional_codes(900, 3, special_ids=range(5)), 0),
        (positional_codes(900, 3), 40),
        (positional_codes(900, 3), 900),
    ],
)
def test_a_device_that_is_not_asked_agrees_with_the_cpu(table, count, with_bias, monkeypatch):
    """There ignored rows stay and count as zero; here they are left out. A row that underflows may be ignored too."""
    cases = [
        Case(dedicated(table, count), with_bias=with_bias),
        maxima_that_meet_nowhere(120, with_bias, min(count, 3)),
    ]
    on_cpu = [case.ours() for case in cases]
    monkeypatch.setattr(softmax, "READ_BY_HOST", frozenset())
    for case, (loss, exact) in zip(cases, on_cpu, strict=True):
        again, ours = case.ours()
        assert abs(again - loss) <= 1e-6 * abs(loss)
        assert all(relative(a, b.double()) < 1e-6 for a, b in zip(ours, exact, strict=True))
        assert (ours[0][case.labels == -100] == 0).all()
        case.labels.fill_(-100)
        total = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias, reduction="sum")
        assert total == 0 and all((gradient == 0).all() for gradient in gradients(total, case.tensors()))


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(softmax, "READ_BY_HOST", frozenset())
    monkeypatch.setattr(dense_block, "FLOAT32_DEVICES", frozenset())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("width", [24, 300])
def test_the_plain_decoder_on_a_device_keeps_the_bounds(width, scale, with_bias, as_on_a_device, monkeypatch):
    """By products of bf16 parts, with the rounding of those; two blocks of rows."""
    monkeypatch.setattr(softmax, "BLOCK_NUMBERS", {"cpu": 1})
    case = Case(plain_codes(1500), rows=90, dim=width, scale=scale, with_bias=with_bias)
    case.check(gradient_limit=1e-4 if scale >= 1000 else 5e-6)
    loss, ours = case.ours()
    again, repeated = case.ours()
    assert loss == again and all(torch.equal(a, b) for a, b in zip(ours, repeated, strict=True))
    assert (ours[0][case.labels == -100] == 0).all()
    exact = case.hidden.detach().double() @ case.layer.dense_weight().detach().double().t()
    exact = (exact if case.bias is None else exact + case.bias.detach().double()).logsumexp(dim=1)
    assert ((log_partition(case.hidden, case.layer, case.bias) - exact).abs() <= 1e-6 * exact.abs().clamp_min(10)).all()
    case.labels.fill_(-100)
    total = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias, reduction="sum")
    assert total == 0 and all((gradient == 0).all() for gradient in gradients(total, case.tensors()))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(0, 20), st.booleans(), st.integers(1, 9), st.integers(2, 17))
def test_any_plain_decoder_on_a_device(as_on_a_device, tokens, unused, with_bias, rows, dim):
    """Tokens in any order of the table's rows, some of which no token has.

    Errors of few numbers do not average out, and a gradient may be the small rest of larger terms.
    """
    case = Case(random_codes(tokens, (tokens + unused,)), rows=rows, dim=dim, with_bias=with_bias)
    case.check(gradient_limit=2**-14)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_plain_decoder_of_bf16_weights_on_a_device(with_bias, as_on_a_device):
    case = Case(plain_codes(200), with_bias=with_bias)
    case.layer.to(torch.bfloat16)
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    assert abs(loss.double() - reference) <= 5e-6 * abs(reference)
    assert all(relative(a, b) <= 4e-3 for a, b in zip(ours, exact, strict=True))
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16


def test_a_device_is_asked_for_underflows_only(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.split("::")[1]
            indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
            masked = any(index is not None and index.dtype == torch.bool for index in indices)
            if masked or name in ("_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "unique"):
                self.names += (name,)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(softmax, "READ_BY_HOST", frozenset())
    for sizes, count in (((9, 11, 40), 0), ((9, 11, 400), 0), ((9, 11, 40), 300)):  # dense and sparse leaves
        for with_bias in (False, True):
            case = Case(dedicated(random_codes(2000, sizes), count), with_bias=with_bias)
            case.ours()  # builds the structures of the codes
            with Waits() as waits:
                case.ours()
            assert waits.names == ("nonzero",)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 300, -1, 1000])
@pytest.mark.parametrize("num_tables", [1, 2, 3, 4, 8])
def test_dedicated_tokens_beside_every_k(num_tables, count, with_bias):
    Case(dedicated(positional_codes(1000, num_tables), count), with_bias=with_bias).check()


@settings(deadline=None, max_examples=60)
@given(any_table(), st.booleans(), st.booleans(), st.integers(1, 200), st.integers(1, 9), st.integers(5, 17))
def test_dedicated_tokens_of_any_code_table(table, with_bias, mixing, count, rows, dim):
    case = Case(dedicated(table, count), rows=rows, dim=dim, with_bias=with_bias, mixing=mixing)
    case.check(gradient_limit=2e-5)  # of few rows: what both parts give to a table may nearly cancel
    with torch.no_grad():
        wanted = case.layer.logits(case.hidden, case.bias)
    torch.testing.assert_close(
        log_partition(case.hidden.detach(), case.layer, case.bias),
        wanted.double().logsumexp(dim=1),
        rtol=1e-5,
        atol=1e-5,
    )
    for k in {1, min(3, table.num_tokens), table.num_tokens}:
        logits, ids = case.layer.predict_topk(case.hidden.detach(), k, case.bias)
        torch.testing.assert_close(logits, wanted.topk(k, dim=1).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(wanted.gather(1, ids), logits, rtol=1e-5, atol=1e-5)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.01, 30.0, 1000.0])
@pytest.mark.parametrize("num_tables", [1, 3])
def test_large_logits_of_dedicated_tokens(num_tables, scale, with_bias):
    case = Case(dedicated(positional_codes(1500, num_tables), 200), scale=scale, with_bias=with_bias)
    case.check(gradient_limit=1e-4 if scale >= 1000 else 5e-6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("num_tables", "count"), [(1, 200), (3, 200), (3, 1500)])
def test_a_dense_block_on_a_device_keeps_the_bounds(num_tables, count, scale, with_bias, as_on_a_device, monkeypatch):
    """By products of bf16 parts, beside the sum and without; two blocks of rows."""
    monkeypatch.setattr(softmax, "BLOCK_NUMBERS", {"cpu": 1})
    case = Case(dedicated(positional_codes(1500, num_tables), count), 90, 100, scale, with_bias, mixing=True)
    case.check(gradient_limit=1e-4 if scale >= 1000 else 5e-6)
    wanted = case.layer.double().logits(case.hidden.double(), case.bias)
    case.layer.float()
    found = log_partition(case.hidden, case.layer, case.bias), case.layer.predict_topk(case.hidden, 1, case.bias)[0]
    for ours, exact in zip(found, (wanted.logsumexp(dim=1), wanted.amax(dim=1, keepdim=True)), strict=True):
        assert ((ours - exact).abs() <= 1e-5 * exact.abs().clamp_min(10)).all()


def test_every_product_of_a_dense_block_on_a_device_is_of_bf16_parts(as_on_a_device, monkeypatch):
    """No product in float32 is as large as rows x tokens x width; the logits have three parts, the gradients two. The
    tokens of the logits are filled up to a multiple of 8."""
    factors = []

    def counted(left, right):
        factors.append((left.shape[-1], right.shape[-1]))
        return multiply(left, right)

    monkeypatch.setattr(dense_block, "multiply", counted)
    case = Case(plain_codes(70), rows=5, dim=24)
    case.ours()
    assert factors == [(6 * 24, 72), *[(70, 24)] * 3, *[(5, 24)] * 3]
    factors.clear()
    Case(dedicated(positional_codes(70, 3), 33), rows=5, dim=24).ours()
    assert factors == [(6 * 24, 40), *[(33, 24)] * 3, *[(5, 24)] * 3]


@pytest.mark.parametrize("gap", [60, 90, 100, 120, 800])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [3, -2])
def test_underflow_beside_dedicated_tokens(gap, with_bias, count):
    maxima_that_meet_nowhere(gap, with_bias, count).check()


@pytest.mark.parametrize("count", [50, -50])
@pytest.mark.parametrize("sizes", [(9, 11, 40), (9, 11, 400)])
def test_a_model_that_is_nearly_sure(count, sizes):
    """Where p of the label is as near to 1 as 1e-6, its gradient is still right: it is minus the sum of the others."""
    case = Case(dedicated(random_codes(500, sizes), count), with_bias=False)
    with torch.no_grad():
        case.hidden.copy_(case.layer.dense_weight()[case.labels.clamp(min=0)] * 1.5)
    counted = case.labels != -100
    ours, exact = (gradients[0][counted].double() for _, gradients in (case.ours(), case.dense(torch.float64)))
    sizes_of_rows = exact.norm(dim=1)
    errors = (ours - exact).norm(dim=1)[sizes_of_rows > 1e-11]  # below, float64's own p - 1 has no digits
    sizes_of_rows = sizes_of_rows[sizes_of_rows > 1e-11]
    assert sizes_of_rows.min() < 1e-5 / len(exact)
    assert (errors <= 3e-4 * sizes_of_rows).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tables", [1, 3])
def test_dedicated_rows_of_zero_change_no_loss_and_no_gradient(num_tables, with_bias):
    table = positional_codes(700, num_tables)
    plain, ours = Case(table, with_bias=with_bias), Case(dedicated(table, 90), with_bias=with_bias)
    with torch.no_grad():
        ours.layer.dedicated_rows.zero_()
        ours.layer.load_state_dict(plain.layer.state_dict(), strict=False)
        ours.hidden.copy_(plain.hidden)
        if with_bias:
            ours.bias.copy_(plain.bias)
    ours.labels = plain.labels
    (loss, found), (wanted, expected) = ours.ours(), plain.ours()
    torch.testing.assert_close(loss, wanted)
    shared = (*found[: 1 + num_tables], *found[2 + num_tables :])
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-7)


def test_dedicated_tokens_that_no_row_may_be():
    """A bias of -inf, as a mask over special tokens: they have no probability, and nothing is NaN."""
    case = Case(dedicated(positional_codes(60, 3), 4))
    with torch.no_grad():
        case.bias[case.layer.dedicated] = -torch.inf
    case.labels[:] = next(n for n in range(60) if n not in case.layer.dedicated)
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    torch.testing.assert_close(loss.double(), reference)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-6)
    assert not ours[-2].any() and not ours[-1][case.layer.dedicated].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mixing", [False, True])
def test_shared_tokens_that_no_row_may_be(mixing, dtype):
    """A bias of -inf for all but the dedicated tokens: the loss, its gradients and log Z are those of the block."""
    case = Case(dedicated(positional_codes(60, 3), 4), mixing=mixing)
    shared = [n for n in range(60) if n not in case.layer.dedicated]
    with torch.no_grad():
        case.bias = case.bias.to(dtype)
        case.bias[shared] = -torch.inf
        case.bias.requires_grad_()
    case.labels[case.labels >= 0] = case.layer.dedicated[1]
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    torch.testing.assert_close(loss.double(), reference)
    for mine, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-3, atol=1e-6)
    assert not ours[-1][shared].any()
    found = log_partition(case.hidden, case.layer, case.bias)
    logits = case.hidden.double() @ case.layer.dense_weight().double().t() + case.bias.double()
    torch.testing.assert_close(found, logits.logsumexp(1), rtol=1e-5, atol=1e-5)


def test_blocks_and_types_of_dedicated_tokens(monkeypatch):
    case = Case(dedicated(positional_codes(1000, 3), 100), rows=101)
    whole, exact = case.ours()
    with torch.autocast("cpu", torch.bfloat16):
        again, ours = case.ours()
    assert again == whole and all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    monkeypatch.setattr(softmax, "FEWEST_ROWS", 7)
    monkeypatch.setattr(softmax, "BLOCK_NUMBERS", {"cpu": 1})
    again, ours = case.ours()
    assert abs(whole - again) <= 1e-6 * whole
    assert all(relative(a, b.double()) < 1e-6 for a, b in zip(ours, exact, strict=True))
    case.layer.bfloat16()
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    assert abs(loss.double() - reference) <= 5e-6 * abs(reference)
    assert all(relative(a, b) < 4e-3 for a, b in zip(ours, exact, strict=True))
    assert [each.dtype for each in ours] == [torch.bfloat16] * 5 + [torch.float32]


def test_a_frozen_part_beside_a_trained_one():
    case = Case(dedicated(positional_codes(100, 2), 9))
    _, everything = case.ours()
    for frozen in ([case.layer.dedicated_rows], list(case.layer.tables), [case.hidden]):
        for tensor in frozen:
            tensor.requires_grad_(False)
        wanted = [each for each in case.tensors() if each.requires_grad]
        again = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias)
        found = iter(gradients(again, wanted))
        for tensor, expected in zip(case.tensors(), everything, strict=True):
            if tensor.requires_grad:
                torch.testing.assert_close(next(found), expected)
            else:
                tensor.requires_grad_()
