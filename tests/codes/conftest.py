"""Shared by the tests of codes."""

from collections.abc import Callable

import numpy as np
import pytest


def topic_vectors(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Vectors (count, width) of words with a topic and, within it, a form; the forms are the same in all topics."""
    draw = np.random.default_rng(seed)
    topics, forms = draw.standard_normal((2, 12, width))
    chosen = draw.choice(12, count, p=np.arange(12, 0, -1) / 78)
    noise = 0.2 * draw.standard_normal((count, width))
    return (3 * topics[chosen] + forms[draw.integers(12, size=count)] + noise).astype(np.float32)


@pytest.fixture(scope="session")
def vectors_of() -> Callable[..., np.ndarray]:
    """The function `topic_vectors`."""
    return topic_vectors
