"""The paper's numbers for the tasks."""

from typing import Any

import numpy as np
import pytest

from ksub_ds.evaluate.data.tasks import LANGUAGES, PAPER_XNLI


@pytest.mark.parametrize("setting", list(PAPER_XNLI))
def test_published_averages_are_the_means_of_their_rows(setting: str) -> None:
    """Guards the table against slips: the paper's averages are means, within its rounding."""
    for row in PAPER_XNLI[setting].values():
        values: list[Any] = [row[language] for language in LANGUAGES]
        assert row["average"] == pytest.approx(float(np.mean(values)), abs=0.11)
