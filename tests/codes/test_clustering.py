"""Algorithm 2: sizes, uniqueness, determinism, the paper's table sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds import clustered_codes
from ksub_ds.codes.alignment import explained_share
from ksub_ds.common.errors import UserError


@given(st.integers(1, 300), st.integers(2, 4), st.integers(0, 99), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_unique_in_range_balanced_and_deterministic(vectors_of, count, num_tables, seed, align, data):
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


def test_one_and_two_processes_give_the_same_codes(vectors_of):
    vectors = vectors_of(2000)
    one, two = (clustered_codes(vectors, 3, 14, seed=3, workers=workers) for workers in (1, 2))
    assert one.sha256 == two.sha256
    assert clustered_codes(vectors, 3, 14, seed=4, workers=1).sha256 != one.sha256


def test_naive_k_means_has_a_last_table_as_long_as_the_largest_leaf(vectors_of):
    """As the paper's Table 3 implies: 100 x 100 x more than 100, where balanced leaves have 100."""
    vectors = vectors_of(3000)
    table = clustered_codes(vectors, 3, 16, balanced=False)
    table.verify()
    leaves = np.unique(table.codes[:, :2], axis=0, return_inverse=True)[1].ravel()
    assert table.table_sizes == (16, 16, np.bincount(leaves).max())
    assert table.table_sizes[-1] > 3000 // 256 + 1
    assert table.metadata["largest_leaf"] == str(table.table_sizes[-1])


def test_unequal_table_sizes_and_leaves_that_do_not_fit(vectors_of):
    table = clustered_codes(vectors_of(1000), 3, 20, table_sizes=np.array([5, 7, 29]))
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
        ({"axes": 0}, "axes 0: must be at least 1"),
        ({"iterations": 0}, "iterations 0: must be at least 1"),
        ({"workers": 0}, "workers 0: must be at least 1"),
        ({"seed": -1}, r"seed -1: must lie in 0\.\.4294967295"),
    ],
)
def test_settings_that_make_no_sense(arguments, named, vectors_of):
    with pytest.raises(UserError, match=named):
        clustered_codes(vectors_of(100), **({"num_tables": 3, "table_size": 6} | arguments))


def test_nan_is_refused_by_row(vectors_of):
    vectors = vectors_of(100)
    vectors[42, 0] = np.nan
    with pytest.raises(UserError, match="row 42"):
        clustered_codes(vectors, 3, 6)


def test_special_tokens_share_no_row(vectors_of):
    vectors = vectors_of(200)
    vectors[[0, 199]] = 0
    table = clustered_codes(vectors, 3, 6, special_ids=[0, 199])
    table.verify()
    assert table.table_sizes == (8, 8, 8)
    assert ((table.codes == table.codes[0]).sum(axis=0) == 1).all()
    rest = clustered_codes(vectors[1:199], 3, 6)
    assert (table.codes[1:199] == rest.codes).all()


def test_tables_too_large_to_fit_are_clustered_without_refinement(monkeypatch, vectors_of):
    for module in ("clustering", "quality", "alignment"):
        monkeypatch.setattr(f"ksub_ds.codes.{module}.LARGEST_FIT", 23)
    table = clustered_codes(vectors_of(300), 3, 8)
    table.verify()
    assert table.table_sizes == (8, 8, 8)


def test_leading_axes_leave_the_noise_out(vectors_of):
    """What varies in 6 of 200 dimensions lies under more noise in all than it has itself."""
    draw = np.random.default_rng(0)
    turn = np.linalg.qr(draw.standard_normal((200, 6)))[0].astype(np.float32)
    clear = vectors_of(3000, 6) @ turn.T
    noisy = clear + 0.4 * draw.standard_normal(clear.shape).astype(np.float32)
    all_axes, some = (clustered_codes(noisy, 3, 16, axes=axes) for axes in (None, 6))
    some.verify()
    assert some.metadata["axes"] == "6" and "axes" not in all_axes.metadata
    explained = [explained_share(clear, table.codes, table.table_sizes) for table in (all_axes, some)]
    assert explained[1] > explained[0] + 0.01
    assert clustered_codes(noisy, 3, 16, axes=200).sha256 == all_axes.sha256
    for scale in (2.0**60, 2.0**-60):  # whose squares are no float32
        assert (clustered_codes(noisy * np.float32(scale), 3, 16, axes=6).codes == some.codes).all()
