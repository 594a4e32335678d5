"""The loss asks a GPU for no TF32 product, whatever the rest of the process is set to."""

import pytest
import torch

from ksub_ds import SubEmbedding, factorized_cross_entropy, positional_codes
from ksub_ds.contraction import precision
from ksub_ds.contraction.max_plus import MaxPlusFold
from ksub_ds.contraction.precision import exact_products
from ksub_ds.contraction.sum_product import Contraction
from ksub_ds.model.softmax import log_partition

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def tf32():
    """TF32 as transformers' Trainer switches it on, and as torch's own function does."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_setting_comes_back(tf32):
    with exact_products(torch.device("cuda")):
        assert MATMUL.fp32_precision == "ieee"
        with exact_products(torch.device("cuda")):
            assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), exact_products(torch.device("cuda")):
        raise KeyError
    assert MATMUL.allow_tf32
    with exact_products(torch.device("cpu")):
        assert MATMUL.allow_tf32


def test_without_tf32_nothing_is_set():
    before = MATMUL.fp32_precision
    with exact_products(torch.device("cuda")):
        assert MATMUL.fp32_precision == before and not MATMUL.allow_tf32


def test_loss_log_partition_and_search_are_exact(tf32, monkeypatch):
    monkeypatch.setattr(precision, "TF32_DEVICES", {"cpu"})
    seen = []
    for owner in (Contraction, MaxPlusFold):
        for name in ("forward", "backward", "__call__"):
            if name in vars(owner):
                monkeypatch.setattr(owner, name, noting(vars(owner)[name], seen))
    layer, hidden = SubEmbedding(positional_codes(200, 3), 12), torch.randn(4, 12)
    for ask in (
        lambda: factorized_cross_entropy(hidden, layer, torch.arange(4)).backward(),
        lambda: log_partition(hidden, layer),
        lambda: layer.most_probable(hidden),
    ):
        seen.clear()
        ask()
        assert seen and set(seen) == {"ieee"}
        assert MATMUL.allow_tf32


def noting(method, seen):
    def call(*arguments, **keywords):
        seen.append(MATMUL.fp32_precision)
        return method(*arguments, **keywords)

    return call


def test_a_compiled_graph_holds_it_whole(tf32, monkeypatch):
    """Dynamo cannot trace the setting: there it is left alone, and the graph unbroken."""
    monkeypatch.setattr(precision, "TF32_DEVICES", {"cpu"})

    def product(rows):
        with exact_products(rows.device):
            return rows @ rows

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(product, backend="eager", fullgraph=True)(torch.ones(2, 2))
    assert compiled.dtype == torch.float32
