"""Algorithm 2: sizes, uniqueness, determinism, the paper's table sizes, and numbers that mean something."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds import CodeTable, clustered_codes, positional_codes
from ksub_ds.codes.alignment import explained_share, match_to_codebook
from ksub_ds.codes.quality import measure_quality
from ksub_ds.common.errors import UserError


def vectors_of(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Words with a topic and, within it, a form: forms are the same in all topics."""
    draw = np.random.default_rng(seed)
    topics, forms = draw.standard_normal((2, 12, width))
    chosen = draw.choice(12, count, p=np.arange(12, 0, -1) / 78)
    noise = 0.2 * draw.standard_normal((count, width))
    return (3 * topics[chosen] + forms[draw.integers(12, size=count)] + noise).astype(np.float32)


@given(st.integers(1, 300), st.integers(2, 4), st.integers(0, 99), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_unique_in_range_balanced_and_deterministic(count, num_tables, seed, align, data):
    table_size = data.draw(st.integers(int(np.ceil(count ** (1 / num_tables) - 1e-9)) + 1, 25), label="table size")
    last_level = data.draw(st.sampled_from(["random", "matched"]), label="last level")
    vectors = vectors_of(count, 5, seed)
    if data.draw(st.booleans(), label="duplicates"):
        vectors[count // 3 :] = vectors[0]
    arguments = {"last_level": last_level, "align": align, "seed": seed}
    table = clustered_codes(vectors, num_tables, table_size, **arguments)
    table.verify()
    assert table.table_sizes == (table_size,) * num_tables and table.num_tokens == count
    for level in range(1, num_tables):
        parents = np.unique(table.codes[:, : level - 1], axis=0, return_inverse=True)[1].ravel()
        for parent in np.unique(parents):
            sizes = np.bincount(table.codes[parents == parent, level - 1], minlength=table_size)
            assert sizes.max() - sizes.min() <= 1
    assert clustered_codes(vectors, num_tables, table_size, **arguments).sha256 == table.sha256


def test_one_and_two_processes_give_the_same_codes():
    vectors = vectors_of(2000)
    one, two = (clustered_codes(vectors, 3, 14, seed=3, workers=workers) for workers in (1, 2))
    assert one.sha256 == two.sha256
    assert clustered_codes(vectors, 3, 14, seed=4, workers=1).sha256 != one.sha256


def test_naive_k_means_has_a_last_table_as_long_as_the_largest_leaf():
    """As the paper's Table 3 implies: 100 x 100 x more than 100, where balanced leaves have 100."""
    vectors = vectors_of(3000)
    table = clustered_codes(vectors, 3, 16, balanced=False)
    table.verify()
    leaves = np.unique(table.codes[:, :2], axis=0, return_inverse=True)[1].ravel()
    assert table.table_sizes == (16, 16, np.bincount(leaves).max())
    assert table.table_sizes[-1] > 3000 // 256 + 1
    assert table.metadata["largest_leaf"] == str(table.table_sizes[-1])


def test_unequal_table_sizes_and_leaves_that_do_not_fit():
    table = clustered_codes(vectors_of(1000), 3, 20, table_sizes=(5, 7, 29))
    table.verify()
    assert table.table_sizes == (5, 7, 29)
    leaves = np.unique(table.codes[:, :2], axis=0, return_counts=True)[1]
    assert sorted(set(leaves.tolist())) == [28, 29]
    with pytest.raises(UserError, match="leaves of 29 tokens, but the last table has 28 rows"):
        clustered_codes(vectors_of(1000), 3, 20, table_sizes=(5, 7, 28))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_tables": 1}, "num_tables 1"),
        ({"table_sizes": (5, 5)}, "must be 3 positive"),
        ({"last_level": "best"}, "last_level 'best'"),
        ({"special_ids": [100]}, r"\[0, 100\)"),
        ({"special_ids": range(100)}, "special"),
    ],
)
def test_settings_that_make_no_sense(arguments, named):
    with pytest.raises(UserError, match=named):
        clustered_codes(vectors_of(100), **({"num_tables": 3, "table_size": 6} | arguments))


def test_nan_is_refused_by_row():
    vectors = vectors_of(100)
    vectors[42, 0] = np.nan
    with pytest.raises(UserError, match="row 42"):
        clustered_codes(vectors, 3, 6)


def test_special_tokens_share_no_row():
    vectors = vectors_of(200)
    vectors[[0, 199]] = 0
    table = clustered_codes(vectors, 3, 6, special_ids=[0, 199])
    table.verify()
    assert table.table_sizes == (8, 8, 8)
    assert ((table.codes == table.codes[0]).sum(axis=0) == 1).all()
    rest = clustered_codes(vectors[1:199], 3, 6)
    assert (table.codes[1:199] == rest.codes).all()


def test_explained_share_is_dense_least_squares():
    vectors = vectors_of(200, 7)
    table = positional_codes(200, 3)
    design = np.concatenate([np.eye(6)[table.codes[:, k]] for k in range(3)], axis=1)
    centred = vectors - vectors.mean(axis=0)
    left = centred - design @ np.linalg.lstsq(design, centred, rcond=None)[0]
    expected = 1 - np.square(left).sum() / np.square(centred).sum()
    assert explained_share(vectors, table.codes, table.table_sizes) == pytest.approx(expected, abs=1e-5)
    plain = CodeTable(np.arange(200)[:, None], (200,))
    assert explained_share(vectors, plain.codes, (200,)) == pytest.approx(1)


def test_matching_finds_the_common_forms():
    """Each group holds the same 8 directions, shuffled: equal ones get equal rows."""
    draw = np.random.default_rng(0)
    forms = draw.standard_normal((8, 10))
    order = np.concatenate([draw.permutation(8) for _ in range(30)])
    items = (forms[order] + 0.05 * draw.standard_normal((240, 10))).astype(np.float32)
    rows = match_to_codebook(items, np.repeat(np.arange(30), 8), 8, seed=0)
    assert all((rows[order == form] == rows[order == form][0]).all() for form in range(8))


def test_meaning_in_the_numbers_explains_more():
    vectors = vectors_of(1500)

    def share(**arguments: object) -> float:
        table = clustered_codes(vectors, 3, 12, **arguments)
        return explained_share(vectors, table.codes, table.table_sizes)

    positional = positional_codes(1500, 3)
    paper, matched = share(last_level="random", align=False), share(last_level="matched", align=False)
    both = share(last_level="matched", align=True)
    assert explained_share(vectors, positional.codes, positional.table_sizes) < paper < matched < both


def test_quality_report():
    vectors = vectors_of(1500)
    table = clustered_codes(vectors, 3, 12)
    report = measure_quality(vectors, table)
    assert report["level_sizes"] == ["125 to 125", "10 to 11"] and report["largest_leaf"] == 11
    assert report["neighbours_share"] > 3 * report["positional_neighbours_share"]
    assert report["rank_correlation"] > 0.1
    assert all(0.9 < ratio < 1.5 for ratio in report["inertia_over_free"])
    assert report["explained_variance"] > report["positional_explained_variance"]


def test_quality_of_a_few_tokens():
    for count in (2, 5):
        report = measure_quality(vectors_of(count), clustered_codes(vectors_of(count), 2, 3))
        assert report["largest_leaf"] == -(-count // 3)


def test_tables_too_large_to_fit_are_clustered_without_refinement(monkeypatch):
    for module in ("clustering", "quality", "alignment"):
        monkeypatch.setattr(f"ksub_ds.codes.{module}.LARGEST_FIT", 23)
    table = clustered_codes(vectors_of(300), 3, 8)
    table.verify()
    assert table.table_sizes == (8, 8, 8)
