"""What models of `ksub evaluate xnli` answered right, for tests over several pretrained models."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ksub_ds.common.files import read_json


def right_answers(folder: Path) -> dict[str, NDArray[np.bool_]]:
    """Return which rows of each language's test set were answered right.

    Args:
        folder: the --out of `ksub evaluate xnli` with one model and one seed.

    Returns:
        (n,) for each language, in the order of the rows, which are parallel.
    """
    stored = read_json(folder / "predictions.json")
    (answers,) = stored["predictions"].values()
    return {
        language: np.frombuffer(answers[language].encode(), np.uint8) == np.frombuffer(gold.encode(), np.uint8)
        for language, gold in stored["labels"].items()
    }
