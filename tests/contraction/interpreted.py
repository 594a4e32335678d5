"""The fused sum in Triton's interpreter, on the CPU: `test_fused.py` runs this file in a process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/contraction/interpreted.py

The interpreter is switched on before Triton is imported, for the whole process.
"""

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksub_ds import CodeTable, factorized_cross_entropy, positional_codes
from ksub_ds.contraction import dense_block, fused
from ksub_ds.contraction.code_structure import CodeStructure
from ksub_ds.contraction.fused import FusedContraction
from ksub_ds.model import softmax
from ksub_ds.model.softmax import log_partition

from ..model.loss_case import Case, dedicated, gradients, maxima_that_meet_nowhere, random_codes, relative

pytestmark = pytest.mark.timeout(900)  # a second each on a free core


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the kernels that a GPU would run, and names what it would wait for."""

    VIEWS = re.compile(
        r"_?(unsafe_)?(view|t|transpose|slice|select|(un)?squeeze|expand|split(_with_sizes)?|detach|alias|permute|"
        r"as_strided|(new_)?empty(_like|_strided)?|lift_fresh|unbind)"
    )
    WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal", "is_nonzero")
    INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels, self.waits = [], []
        run, inside = FusedContraction.run, []

        def counted(box, kernel, *arguments, **constants):
            self.kernels.append(kernel)
            inside.append(kernel)
            run(box, kernel, *arguments, **constants)
            inside.pop()

        self.inside = inside  # the interpreter copies tensors to numpy and back: no kernels of ours
        monkeypatch.setattr(FusedContraction, "run", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if not self.inside:
            masks = [index for index in args[1] if index is not None] if name in self.INDEXED else []
            if name in self.WAITS or any(mask.dtype == torch.bool for mask in masks):
                self.waits.append(name)
            if not self.VIEWS.fullmatch(name):
                self.kernels.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    monkeypatch.setattr(fused, "PROGRAMS", 6)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Ignored rows stay, as where the host does not look at values."""
    monkeypatch.setattr(softmax, "READ_BY_HOST", frozenset())
    monkeypatch.setattr(dense_block, "FLOAT32_DEVICES", frozenset())


def clustered(num_tokens, size, rows, seed=0):
    """Equal leaves with random last codes, as balanced clusters have."""
    draw = np.random.default_rng(seed)
    leaf, place = np.arange(num_tokens) % size**2, np.arange(num_tokens) // size**2
    last = np.argsort(draw.random((size**2, rows)), axis=1)[leaf, place]
    return CodeTable(np.stack([leaf // size, leaf % size, last], axis=1), (size, size, rows))


def more_rows_than_a_tile(rows=16, tokens=600):
    """Three tables of a tile's rows and five more, which one token has each, as for reserved special tokens."""
    draw = np.random.default_rng(0)
    ordinary = np.unique(draw.integers(0, rows, (tokens, 3)), axis=0)
    codes = np.concatenate([ordinary, np.arange(rows, rows + 5)[:, None].repeat(3, axis=1)])
    return CodeTable(codes[draw.permutation(len(codes))], (rows + 5,) * 3)


MORE_ROWS = "more rows than a tile"
PIECES = "two tables of more rows than a tile"
TABLES = {
    **{f"positional, K = {k}": positional_codes(1000, k) for k in range(2, 9)},
    PIECES: random_codes(2500, (150, 180)),
    "positional, reserved": positional_codes(900, 3, special_ids=range(5)),
    "clustered": clustered(2000, 12, 40),
    "holes": random_codes(700, (9, 17, 35)),
    MORE_ROWS: more_rows_than_a_tile(),
    "four tables, holes": random_codes(60, (9, 8, 7, 6)),
}


def case_of(name, monkeypatch, **options):
    """Make a case, with small tiles where more rows than a tile are wanted: 133 rows take the interpreter minutes."""
    if name == MORE_ROWS:
        monkeypatch.setattr(fused, "LARGEST_TILE", 16)
    return Case(TABLES[name], **options)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_codes(name, with_bias, as_on_a_device, monkeypatch):
    case = case_of(name, monkeypatch, with_bias=with_bias)
    assert case.layer.structure.form.startswith("fused")
    assert bool(len(case.layer.structure.fused.outside)) is (name == MORE_ROWS)
    case.check()


@pytest.fixture
def small_tiles(monkeypatch):
    """Boxes of several pieces that are small."""
    monkeypatch.setattr(fused, "LARGEST_TILE", 16)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "tokens", "chunks"),
    [((40, 37), 900, (3, 3)), ((33, 5), 130, (3, 1)), ((5,) * 5, 900, (1, 2))],
)
def test_boxes_of_several_pieces(sizes, tokens, chunks, with_bias, as_on_a_device, small_tiles, monkeypatch):
    monkeypatch.setattr(fused, "MOST_OUTSIDE", 0)
    case = Case(random_codes(tokens, sizes), rows=45, with_bias=with_bias)
    assert case.layer.structure.fused.chunks == chunks
    case.check()


@pytest.mark.parametrize("gap", [60, 800])
@pytest.mark.parametrize("with_bias", [False, True])
def test_maxima_of_two_tables_that_meet_in_no_token(gap, with_bias, as_on_a_device, small_tiles):
    """The favourite codes lie in different pieces: Z loses exp(gap)."""
    codes = np.array([(a, b) for a in range(20) for b in range(18) if a != 19 or b != 17])
    case = Case(CodeTable(codes, (20, 18)), rows=6, dim=2, with_bias=with_bias)
    with torch.no_grad():
        for table in case.layer.tables:
            table.copy_(torch.linspace(-0.01, 0.01, len(table)).unsqueeze(1))
            table[-1] = 1.0
        case.hidden.fill_(gap)
        case.hidden[::2] += torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    case.check()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("name", "count"), [("clustered", 40), ("positional, K = 8", 3), (MORE_ROWS, 30), ("holes", -5)]
)
def test_dedicated_tokens_beside_the_box(name, count, with_bias, as_on_a_device, monkeypatch):
    if name == MORE_ROWS:
        monkeypatch.setattr(fused, "LARGEST_TILE", 16)
    case = Case(dedicated(TABLES[name], count), with_bias=with_bias)
    assert re.fullmatch("fused, .* dedicated tokens beside it", case.layer.structure.form)
    case.check()
    wanted = case.layer.logits(case.hidden, case.bias).double().logsumexp(dim=1)
    torch.testing.assert_close(log_partition(case.hidden, case.layer, case.bias), wanted, rtol=1e-5, atol=1e-5)
    with Watch(monkeypatch) as watch:
        case.ours()
    assert not watch.waits


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gap", [60, 104])
def test_underflow_beside_dedicated_tokens(gap, with_bias, as_on_a_device):
    maxima_that_meet_nowhere(gap, with_bias, 3).check()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_rows_that_do_not_fill_the_programs(rows, as_on_a_device):
    Case(random_codes(300, (5, 9, 17)), rows=rows, seed=rows).check()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.01, 30.0, 1000.0])
def test_large_logits(scale, with_bias, as_on_a_device):
    case = Case(positional_codes(1500, 3), scale=scale, with_bias=with_bias)
    case.check(gradient_limit=1e-4 if scale >= 1000 else 5e-6)


@pytest.mark.parametrize("gap", [60, 90, 104, 800])
@pytest.mark.parametrize("with_bias", [False, True])
def test_maxima_that_meet_in_no_token(gap, with_bias, as_on_a_device):
    maxima_that_meet_nowhere(gap, with_bias).check()


@pytest.mark.parametrize("with_bias", [False, True])
def test_tokens_outside_the_box(with_bias, as_on_a_device, monkeypatch):
    """Their rows have the largest scores: as one token they dominate, and mixed they meet in none."""
    monkeypatch.setattr(fused, "LARGEST_TILE", 16)
    case = Case(more_rows_than_a_tile(), rows=12, dim=3, with_bias=with_bias)
    assert len(case.layer.structure.fused.outside) == 5
    case.check()
    with torch.no_grad():
        for k, table in enumerate(case.layer.tables):
            table.mul_(0.01)
            table[19], table[16 + k], table[k] = 0.9, 1.0, 0.8
        case.hidden[:4] = 100.0
        case.labels[0] = int((case.layer.codes[:, 0] == 19).nonzero())
    case.check()


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 7), min_size=3, max_size=5) | st.lists(st.integers(1, 40), min_size=2, max_size=2),
    st.integers(1, 200), st.booleans(), st.integers(9, 40), st.integers(0, 99),
)  # fmt: skip
def test_any_code_table(small_tiles, sizes, tokens, with_bias, rows, seed):
    table = random_codes(min(tokens, int(np.prod(sizes))), tuple(sizes), seed)
    case = Case(table, rows=rows, dim=17, with_bias=with_bias, seed=seed)
    assert case.layer.structure.fused is not None
    rounding_of_one_product = 2**-16  # what two parts of bf16 lose: of a sum of few tokens nothing averages out
    # A gradient may be the small rest of larger terms.
    case.check(gradient_limit=4 * rounding_of_one_product, loss_limit=rounding_of_one_product)


def test_ignored_rows_count_as_zero_wherever_they_are(as_on_a_device):
    case = Case(positional_codes(900, 3), rows=40)
    loss, ours = case.ours()
    assert (ours[0][case.labels == -100] == 0).all()
    kept = case.labels != -100
    short = Case(positional_codes(900, 3), rows=40)
    short.hidden, short.labels = case.hidden.detach()[kept].requires_grad_(), case.labels[kept]
    again, exact = short.ours()
    assert abs(loss - again) < 1e-6 and relative(ours[0][kept], exact[0].double()) < 1e-6
    assert all(relative(a, b.double()) < 1e-6 for a, b in zip(ours[1:], exact[1:], strict=True))
    case.labels.fill_(-100)
    total = factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias, reduction="sum")
    assert total == 0 and all((gradient == 0).all() for gradient in gradients(total, case.tensors()))
    assert case.ours()[0].isnan()


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fused_and_the_torch_form_agree(with_bias, monkeypatch):
    """Two runs of the fused form are the same to the bit; blocks of rows change nothing; log Z alone is the same."""
    case = Case(clustered(700, 8, 20), rows=140, with_bias=with_bias)
    loss, ours = case.ours()
    again, repeated = case.ours()
    assert loss == again and all(torch.equal(a, b) for a, b in zip(ours, repeated, strict=True))
    log_z = log_partition(case.hidden, case.layer, case.bias)
    monkeypatch.setattr(softmax, "BLOCK_NUMBERS", {"cpu": 1})
    blocked, parts = case.ours()
    monkeypatch.setattr(CodeStructure, "fused", None)
    wanted, exact = case.ours()
    assert (log_partition(case.hidden, case.layer, case.bias) - log_z).abs().max() < 2e-5
    for mine, gradients_ in ((loss, ours), (blocked, parts)):
        assert abs(mine - wanted) <= 5e-6 * wanted
        assert all(relative(a, b.double()) <= 5e-6 for a, b in zip(gradients_, exact, strict=True))


@pytest.mark.parametrize(
    ("name", "most"),
    [(PIECES, 35), ("clustered", 35), ("positional, reserved", 35), (MORE_ROWS, 37), ("positional, K = 8", 55)],
)
def test_kernels_and_waits_of_a_micro_batch(name, most, as_on_a_device, monkeypatch):
    """The kernels of a GPU: those of torch, and ours. K = 8 has more tables to multiply by."""
    case = case_of(name, monkeypatch)
    case.ours()
    with Watch(monkeypatch) as watch:
        factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias).backward()
    print(f"{name}: {len(watch.kernels)} kernels: {' '.join(watch.kernels)}")
    assert not watch.waits
    assert len(watch.kernels) <= most


def test_no_gradients_no_folds_for_them(monkeypatch):
    case = Case(positional_codes(900, 3))
    loss = case.ours()[0]
    with Watch(monkeypatch) as watch, torch.no_grad():
        assert factorized_cross_entropy(case.hidden, case.layer, case.labels, case.bias) == loss
    assert not {"fold_over_j", "fold_over_rows", "make_score_grads"} & set(watch.kernels)
    frozen = case.bias.detach()
    with Watch(monkeypatch) as watch:
        factorized_cross_entropy(case.hidden, case.layer, case.labels, frozen).backward()
    assert "make_score_grads" in watch.kernels and "fold_over_rows" not in watch.kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype, as_on_a_device):
    case = Case(positional_codes(900, 3))
    case.layer.to(dtype)
    case.hidden = case.hidden.detach().to(dtype).requires_grad_()
    case.bias = case.bias.detach().to(dtype).requires_grad_()
    loss, ours = case.ours()
    reference, exact = case.dense(torch.float64)
    assert abs(loss.double() - reference) <= 5e-6 * abs(reference)
    assert all(relative(a, b) <= (4e-3 if dtype == torch.bfloat16 else 5e-6) for a, b in zip(ours, exact, strict=True))
    assert {gradient.dtype for gradient in ours} == {dtype}
