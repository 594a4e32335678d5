"""Codes for tokens that are added later: unused ones, so that the tables need not grow.

The code space holds M_1 · ... · M_K codes and N tokens use a part of it (Algorithm 1 for XLM-R: 250,002 of 250,047;
balanced clusters of 128: an eighth). A new token costs one bias and nothing else.

Without vectors, new tokens take the first unused codes in the order of Algorithm 1 (the first table's code runs
fastest): for positional codes these are the codes that Algorithm 1 would have given them. With a vector, a token goes
to the nearest leaf that has a free last code, and gets the free code whose tokens in other leaves are most similar.

Rows that `reserve_special_tokens` gave to special tokens are not given to others.
"""

import itertools
import math

import numpy as np

from ksub_ds.codes.table import CodeTable


def extend_codes(table: CodeTable, count: int, vectors: object = None, known: object = None) -> CodeTable:
    """Add `count` new tokens after the N old ones, whose codes do not change.

    Args:
        table: codes of N tokens.
        count: how many tokens to add.
        vectors: (count, p) one vector per new token.
        known: (N, p) vectors of the old tokens, from the same source; needed with `vectors`.

    Raises:
        ValueError: fewer unused codes than new tokens, vectors that do not fit, or codes for the input alone.
    """
    if count < 1:
        raise ValueError(f"{count} new tokens: there must be at least 1")
    if not table.unique:
        raise ValueError("input-only codes take no new tokens; add them to the original and compress it again")
    reserved = count_reserved_rows(table)
    sizes = tuple(size - reserved for size in table.table_sizes)
    free = math.prod(sizes) - (table.num_tokens - reserved)
    if count > free:
        shape, needed = " x ".join(map(str, sizes)), table.num_tokens - reserved + count
        fitting = next(size for size in itertools.count(max(sizes)) if size ** len(sizes) >= needed) + reserved
        raise ValueError(
            f"the code space is full: {count:,} new tokens, but of {math.prod(sizes):,} codes ({shape}) only "
            f"{free:,} are unused; make new codes with --table-size {fitting} or more"
        )
    if vectors is None:
        added = _first_unused(table.codes, sizes, count)
    else:
        added = _nearest(table.codes, sizes, *_check_vectors(table, count, vectors, known))
    metadata = {key: value for key, value in table.metadata.items() if key not in ("tokenizer_fingerprint", "quality")}
    metadata["added_tokens"] = str(int(metadata.get("added_tokens", "0")) + count)
    extended = CodeTable(np.concatenate([table.codes, added]), table.table_sizes, metadata, table.dedicated)
    extended.verify()
    return extended


def count_reserved_rows(table: CodeTable) -> int:
    """Count the rows at the end of every table that belong to one token alone, the same token in all tables."""
    if table.num_tables == 1:
        return 0
    reserved = 0
    uses = [np.bincount(column, minlength=size) for column, size in zip(table.codes.T, table.table_sizes, strict=True)]
    while reserved < min(table.table_sizes) - 1:
        last = np.array(table.table_sizes) - 1 - reserved
        alone = all(use[row] == 1 for use, row in zip(uses, last, strict=True))
        if not (alone and (table.codes == last).all(axis=1).any()):
            break
        reserved += 1
    return reserved


def _check_vectors(table: CodeTable, count: int, vectors: object, known: object) -> tuple[np.ndarray, np.ndarray]:
    """Convert the vectors to float32 matrices.

    Raises:
        ValueError: shapes that do not fit, or a value that is not finite.
    """
    new, old = np.asarray(vectors, dtype=np.float32), np.asarray(known, dtype=np.float32)
    if old.ndim != 2 or len(old) != table.num_tokens or new.shape != (count, old.shape[1]):
        raise ValueError(
            f"vectors {new.shape} and known vectors {old.shape} must be ({count}, p) and ({table.num_tokens}, p)"
        )
    if not (np.isfinite(new).all() and np.isfinite(old).all()):
        raise ValueError("a vector holds NaN or infinity")
    return new, old


def _first_unused(codes: np.ndarray, sizes: tuple[int, ...], count: int) -> np.ndarray:
    """Return the first unused codes (count, K), counting with the first code fastest."""
    limit = len(codes) + count  # among so many numbers, `count` are free
    numbers = np.zeros(len(codes), dtype=np.int64)
    stride = 1
    for column, size in zip(codes.T.astype(np.int64), sizes, strict=True):
        outside = (column >= size) | ((column > 0) & (stride >= limit))
        numbers = np.where(outside, limit, np.minimum(numbers + column * min(stride, limit), limit))
        stride = min(stride * size, limit)
    taken = np.zeros(limit + 1, dtype=bool)
    taken[numbers] = True
    rest = np.flatnonzero(~taken[:limit])[:count]
    added = np.empty((count, len(sizes)), dtype=np.int64)
    for k, size in enumerate(sizes):
        rest, added[:, k] = np.divmod(rest, size)
    return added


def _nearest(codes: np.ndarray, sizes: tuple[int, ...], new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return codes (count, K) in the nearest leaf with room; a leaf is a group of tokens with equal f_1 .. f_(K-1).

    Raises:
        ValueError: all leaves in use are full.
    """
    ordinary = np.flatnonzero((codes < np.array(sizes)).all(axis=1))
    prefixes, leaf_of = np.unique(codes[ordinary, :-1], axis=0, return_inverse=True)
    leaf_of = leaf_of.reshape(-1)
    centres = _means(old[ordinary], leaf_of, len(prefixes))
    last = codes[ordinary, -1]
    residuals = _means(old[ordinary] - centres[leaf_of], last, sizes[-1])  # the mean residual of each last code
    free = np.ones((len(prefixes), sizes[-1]), dtype=bool)
    free[leaf_of, last] = False
    added = np.empty((len(new), codes.shape[1]), dtype=np.int64)
    for token, vector in enumerate(new):
        distances = np.square(centres - vector).sum(axis=1)
        distances[~free.any(axis=1)] = np.inf
        leaf = int(distances.argmin())
        if not np.isfinite(distances[leaf]):
            raise ValueError(
                f"the leaves in use are full: new token {token} finds no free code in any of {len(prefixes):,}; "
                "extend without vectors, or make new codes with larger tables"
            )
        misfit = np.square(centres[leaf] + residuals - vector).sum(axis=1)
        code = int(np.where(free[leaf], misfit, np.inf).argmin())
        free[leaf, code] = False
        added[token] = (*prefixes[leaf], code)
    return added


def _means(vectors: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros((count, vectors.shape[1]), dtype=np.float64)
    np.add.at(sums, groups, vectors)
    return (sums / np.maximum(np.bincount(groups, minlength=count), 1)[:, None]).astype(np.float32)
