"""Windows: each token but the first is predicted once, from no less context than was asked for."""

from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.evaluate.lm.windows import Window, windows


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_each_token_is_predicted_once_with_its_context(length: int, window: int, data: st.DataObject) -> None:
    context = data.draw(st.integers(1, window))
    found = windows(length, window, context)
    assert [token for part in found for token in range(part.first, part.end + 1)] == list(range(1, length))
    for part in found:
        assert 0 <= part.begin < part.first <= part.end < length and part.length <= window
        assert part.first - part.begin >= min(context, part.first), "the first one predicted has the least before it"


def test_the_last_window_reads_as_much_as_fits() -> None:
    assert windows(11, 4, 1) == [Window(0, 1, 4), Window(4, 5, 8), Window(6, 9, 10)]
    assert windows(8, 4, 3) == [Window(0, 1, 4), Window(2, 5, 6), Window(3, 7, 7)]
    assert windows(3, 4, 2) == [Window(0, 1, 2)] and windows(1, 4, 2) == [] == windows(0, 4, 2)
