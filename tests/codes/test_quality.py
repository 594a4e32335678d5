"""The report on how well codes fit their vectors."""

from ksub_ds import clustered_codes
from ksub_ds.codes.quality import measure_quality


def test_quality_report(vectors_of):
    vectors = vectors_of(1500)
    table = clustered_codes(vectors, 3, 12)
    report = measure_quality(vectors, table)
    assert report["level_sizes"] == ["125 to 125", "10 to 11"] and report["largest_leaf"] == 11
    assert report["neighbours_share"] > 3 * report["positional_neighbours_share"]
    assert report["rank_correlation"] > 0.1
    assert all(0.9 < ratio < 1.5 for ratio in report["inertia_over_free"])
    assert report["explained_variance"] > report["positional_explained_variance"]


def test_quality_of_a_few_tokens(vectors_of):
    for count in (2, 5):
        report = measure_quality(vectors_of(count), clustered_codes(vectors_of(count), 2, 3))
        assert report["largest_leaf"] == -(-count // 3)


def test_quality_of_one_token(vectors_of):
    report = measure_quality(vectors_of(1), clustered_codes(vectors_of(1), 2, 3))
    assert report["largest_leaf"] == 1 and "neighbours_share" not in report
