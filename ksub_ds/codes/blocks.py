"""Blocks of rows on some threads: what is computed does not depend on how many."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

BLOCK = 8_192  # rows; results of blocks are put together in order
Result = TypeVar("Result")


def map_blocks(function: Callable[[slice], Result], count: int, threads: int) -> Iterator[Result]:
    """`function` of every block of rows, in order, on some threads (numpy lets go of the GIL)."""
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    if threads == 1 or len(blocks) == 1:
        yield from map(function, blocks)
    else:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, blocks)
