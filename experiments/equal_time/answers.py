"""What a model of `ksub evaluate xnli` answered right, for tests over several pretrained models."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def right_answers(predictions: dict[str, Any]) -> dict[str, NDArray[np.bool_]]:
    """Return which rows of each language's test set were answered right.

    Args:
        predictions: content of predictions.json, of one model and one seed.

    Returns:
        (n,) for each language, in the order of the rows, which are parallel.
    """
    (answers,) = predictions["predictions"].values()
    return {
        language: np.frombuffer(answers[language].encode(), np.uint8) == np.frombuffer(gold.encode(), np.uint8)
        for language, gold in predictions["labels"].items()
    }
