"""The paper's numbers."""

from typing import Any

import numpy as np
import pytest

from ksub_ds.evaluate.data import paper_results
from ksub_ds.evaluate.data.tasks import LANGUAGES


@pytest.mark.parametrize("setting", list(paper_results.XNLI))
def test_published_averages_are_the_means_of_their_rows(setting: str) -> None:
    """Guards the table against slips: the paper's averages are means, within its rounding."""
    for row in paper_results.XNLI[setting].values():
        values: list[Any] = [row[language] for language in LANGUAGES]
        assert row["average"] == pytest.approx(float(np.mean(values)), abs=0.11)
