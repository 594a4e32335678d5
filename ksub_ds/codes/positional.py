"""Algorithm 1 of the paper: positional allocation. The codes of token n are its digits in base M.

    M = the least integer with M^K >= N        f_k(n) = floor(n / M^(k-1)) mod M,  k = 1..K

The paper calls this "random allocation" since the digits carry no meaning; it prints `mod M^k`,
but its text, and its parameter counts, need the k-th digit, hence `mod M`.
"""

from collections.abc import Iterable

import numpy as np

from ksub_ds.codes.table import CodeTable, reserve_special_tokens

MOST_CODES = 2**28  # far beyond any vocabulary; more is a typing error, and would fill the memory


def smallest_base(num_tokens: int, num_tables: int) -> int:
    """Return the least integer M with M^K >= N; computed in integers, as float roots are off by one at exact powers."""
    low, high = 1, num_tokens
    while low < high:
        middle = (low + high) // 2
        if middle**num_tables >= num_tokens:
            high = middle
        else:
            low = middle + 1
    return low


def positional_codes(
    num_tokens: int, num_tables: int, special_ids: Iterable[int] = (), table_size: int | None = None
) -> CodeTable:
    """Make codes by Algorithm 1.

    Args:
        num_tokens: N >= 1.
        num_tables: K >= 1.
        special_ids: tokens that get a row of their own in every table (see `reserve_special_tokens`).
        table_size: M, more than the least for N, to leave codes free for tokens that are added later. [the least]

    Raises:
        ValueError: a count below 1, tables too small for N codes, or a special id that is not a token.
    """
    if num_tokens < 1 or num_tables < 1 or num_tokens * num_tables > MOST_CODES:
        raise ValueError(
            f"num_tokens {num_tokens:,} x num_tables {num_tables:,}: both must be at least 1, "
            f"and their product at most {MOST_CODES:,}"
        )
    special = sorted(set(special_ids))
    ordinary = num_tokens - len(special)
    if ordinary < 1:
        raise ValueError(f"all {num_tokens} tokens are special: none is left to code")
    least = smallest_base(ordinary, num_tables)
    base = least if table_size is None else table_size - len(special)
    if base > MOST_CODES:
        raise ValueError(f"table size {table_size}: must be at most {MOST_CODES:,}")
    if base < least:
        raise ValueError(f"table size {table_size}: too small for {num_tokens:,} tokens; {least + len(special)} fits")
    digits, rest = np.empty((ordinary, num_tables), dtype=np.int32), np.arange(ordinary)
    for k in range(num_tables):
        rest, digits[:, k] = np.divmod(rest, base)
    table = CodeTable(digits, (base,) * num_tables, {"algorithm": "positional"})
    return reserve_special_tokens(table, special) if special else table


def plain_codes(num_tokens: int) -> CodeTable:
    """Make the codes of a plain embedding, the baseline: K = 1, M = N."""
    return CodeTable(np.arange(num_tokens)[:, None], (num_tokens,), {"algorithm": "plain"})
