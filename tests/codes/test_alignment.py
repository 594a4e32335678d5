"""Numbers of clusters and last codes that carry meaning, and the share of variance that codes explain."""

import numpy as np
import pytest

from ksub_ds import CodeTable, clustered_codes, positional_codes
from ksub_ds.codes.alignment import explained_share, match_to_codebook


def test_explained_share_is_dense_least_squares(vectors_of):
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


def test_meaning_in_the_numbers_explains_more(vectors_of):
    vectors = vectors_of(1500)

    def share(**arguments: object) -> float:
        table = clustered_codes(vectors, 3, 12, **arguments)
        return explained_share(vectors, table.codes, table.table_sizes)

    positional = positional_codes(1500, 3)
    paper, matched = share(last_level="random", align=False), share(last_level="matched", align=False)
    both = share(last_level="matched", align=True)
    assert explained_share(vectors, positional.codes, positional.table_sizes) < paper < matched < both
