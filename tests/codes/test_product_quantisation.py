"""Product quantisation: its rows and codes against brute force, weights, and the rotation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.product_quantisation import product_quantisation
from ksub_ds.codes.table import table_widths
from ksub_ds.convert.fitting import fit_tables


def clouds(count=400, width=12, seed=0):
    draw = np.random.default_rng(seed)
    scales = 2.0 ** -np.arange(width)
    turn = np.linalg.qr(draw.standard_normal((width, width)))[0]
    return ((draw.standard_normal((count, width)) * scales) @ turn + 1).astype(np.float32)


def composed(found):
    rows = np.concatenate([part[found.table.codes[:, k]] for k, part in enumerate(found.rows)], axis=1)
    return rows if found.rotation is None else rows @ found.rotation.T


def squared_error(vectors, found, weights=None):
    lost = np.square(vectors.astype(np.float64) - composed(found)).sum(axis=1)
    return float(lost.mean() if weights is None else weights @ lost / weights.sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 2, 16]), st.booleans(), st.booleans())
def test_codes_name_the_nearest_row_and_rows_are_means(num_tables, size, weighted, rotate):
    vectors = clouds()
    weights = np.random.default_rng(1).integers(0, 4, len(vectors)) + 0.5 if weighted else None
    found = product_quantisation(vectors, num_tables, size, weights, rotate)
    assert found.table.table_sizes == (size,) * num_tables and not found.table.unique
    found.table.verify()
    turned = vectors if found.rotation is None else vectors @ found.rotation
    parts = np.split(turned, np.cumsum(table_widths(12, num_tables))[:-1], axis=1)
    mass = np.ones(len(vectors)) if weights is None else weights
    for k, (part, rows) in enumerate(zip(parts, found.rows, strict=True)):
        codes = found.table.codes[:, k]
        for code in np.unique(codes):
            mean = np.average(part[codes == code], axis=0, weights=mass[codes == code])
            np.testing.assert_allclose(rows[code], mean, rtol=1e-3, atol=1e-4)
        distance = np.square(part[:, None] - rows[None]).sum(axis=2)
        lost = distance[np.arange(len(part)), codes] - distance.min(axis=1)
        assert (mass @ lost) <= 0.3 * (mass @ distance.min(axis=1)) + 1e-5  # rows moved once after the last assignment


def test_a_rotation_is_one_and_helps_where_columns_hang_together():
    vectors = clouds(2000)
    plain, turned = (product_quantisation(vectors, 4, 16, rotate=rotate) for rotate in (False, True))
    np.testing.assert_allclose(turned.rotation @ turned.rotation.T, np.eye(12), atol=1e-4)
    assert squared_error(vectors, turned) < 0.7 * squared_error(vectors, plain)


def test_heavy_vectors_are_met_more_closely():
    vectors = clouds(2000)
    weights = np.where(np.arange(2000) < 100, 50.0, 1.0)
    plain, weighted = (product_quantisation(vectors, 4, 16, each) for each in (None, weights))
    assert squared_error(vectors[:100], weighted_part(weighted, 100)) < squared_error(
        vectors[:100], weighted_part(plain, 100)
    )
    assert squared_error(vectors, weighted, weights) < squared_error(vectors, plain, weights)


def weighted_part(found, count):
    table = type(found.table)(found.table.codes[:count], found.table.table_sizes, unique=False)
    return type(found)(table, found.rows, found.rotation)


def test_a_sample_stands_for_all(monkeypatch):
    vectors = clouds(4000)
    whole = product_quantisation(vectors, 4, 16)
    monkeypatch.setattr("ksub_ds.codes.product_quantisation.SAMPLE", 1000)
    sampled = product_quantisation(vectors, 4, 16, seed=1)
    assert squared_error(vectors, sampled) < 1.2 * squared_error(vectors, whole)
    again = product_quantisation(vectors, 4, 16, seed=1)
    assert (again.table.codes == sampled.table.codes).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tables": 13}, "num_tables must lie in 1..embedding_dim = 12"),
        ({"num_tables": 2, "table_size": 401}, "tables of 401 rows: k-means sees 400 vectors"),
        ({"num_tables": 2, "table_size": 0}, "tables of 0 rows"),
        ({"num_tables": 2, "weights": np.zeros(400)}, "weights must be 400 numbers"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        product_quantisation(clouds(), **{"table_size": 16} | arguments)
    for number in (np.nan, np.inf, -1e21):  # squares of the last one would end the process in FAISS
        with pytest.raises(ValueError, match="NaN or beyond 1e\\+15"):
            product_quantisation(np.full((20, 4), number, np.float32), 2, 4)


@pytest.mark.parametrize("scale", [1e-42, 1e39])
def test_the_scale_of_the_weights_means_nothing(scale):
    vectors, weights = clouds(), np.linspace(1, 2, 400)
    found, scaled = (product_quantisation(vectors, 2, 16, each) for each in (weights, weights * scale))
    for rows, others in zip(found.rows, scaled.rows, strict=True):
        np.testing.assert_allclose(rows, others, rtol=1e-5)
    table = positional_codes(400, 2)
    fits = [fit_tables(vectors, table, "none", each).error for each in (weights, weights * scale)]
    assert fits[1] == pytest.approx(fits[0], rel=1e-9)


def test_no_table_has_more_rows_than_k_means_sees_vectors(monkeypatch):
    monkeypatch.setattr("ksub_ds.codes.product_quantisation.SAMPLE", 100)
    with pytest.raises(ValueError, match="tables of 101 rows: k-means sees 100 vectors"):
        product_quantisation(clouds(), 2, 101)
    assert product_quantisation(clouds(), 2, 100).table.table_sizes == (100, 100)
