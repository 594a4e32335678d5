"""Every form of the fold's leaves and levels, in the loss against dense float64."""

import pytest

from ksub_ds import positional_codes
from ksub_ds.contraction.sum_product import CompleteLevel, PairedLevel, SparseLevel

from ..model.loss_case import Case, random_codes


def contraction(case):
    return case.layer.structure.unweighted if case.bias is None else case.layer.structure.weighted


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_and_sparse_leaves_agree_with_the_reference(dense, with_bias):
    case = Case(random_codes(2000, (9, 11, 40 if dense else 400)), with_bias=with_bias)
    assert contraction(case).leaf_shape.is_dense is dense
    case.check()


@pytest.mark.parametrize(
    ("table", "with_bias", "form"),
    [
        (positional_codes(1000, 3), True, CompleteLevel),
        (positional_codes(1000, 3), False, PairedLevel),
        (positional_codes(1000, 4, special_ids=range(5)), False, PairedLevel),
        (random_codes(60, (9, 8, 7, 6)), True, SparseLevel),
        (random_codes(60, (9, 8, 7, 6)), False, SparseLevel),
    ],
)
def test_every_form_of_an_inner_level(table, with_bias, form):
    case = Case(table, with_bias=with_bias)
    assert form in {type(level) for level in contraction(case).inner}
    case.check()
