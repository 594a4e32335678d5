"""Blocks of rows, computed on several threads: the result does not depend on how many."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

LARGEST_NUMBER = 1e15  # in a vector; products of such numbers are still float32
BLOCK_ROWS = 8_192  # results of blocks are combined in order, so sums are the same on any number of threads
Result = TypeVar("Result")


def map_blocks(function: Callable[[slice], Result], count: int, threads: int) -> Iterator[Result]:
    """Apply `function` to every block of rows on some threads; numpy releases the GIL.

    Args:
        function: takes the slice of rows of a block.
        count: how many rows there are.
        threads: does not change the results.

    Returns:
        The results, in the order of the blocks.
    """
    blocks = [slice(start, min(start + BLOCK_ROWS, count)) for start in range(0, count, BLOCK_ROWS)]
    return map_each(function, threads, blocks)


def map_each(function: Callable[..., Result], threads: int, *items: Sequence[Any]) -> Iterator[Result]:
    """Apply `function` to what belongs to every block, as `map` does, on some threads.

    Args:
        function: takes one of each of `items`.
        threads: does not change the results.
        items: of the same length, one for each block.

    Yields:
        The results, in the order of the blocks.
    """
    if threads == 1 or len(items[0]) == 1:
        yield from map(function, *items)
    else:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, *items)
