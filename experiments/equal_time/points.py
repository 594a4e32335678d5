"""The embeddings that are compared, in the order in which they are trained."""

from dataclasses import dataclass

from ksub_ds.codes.positional import smallest_base
from ksub_ds.common.errors import UserError

NUM_TABLES = 3


@dataclass(frozen=True)
class Point:
    """One embedding.

    Attributes:
        kind: "plain", "positional", "clustered", or "dedicated": clustered, and rows of their own for some tokens.
        table_size: M; 0 for plain.
        dedicated_rows: F.
    """

    kind: str
    table_size: int = 0
    dedicated_rows: int = 0

    @property
    def name(self) -> str:
        """Name the point and its files."""
        sizes = [str(size) for size in (self.table_size, self.dedicated_rows) if size]
        return "-".join([self.kind, *sizes])


def all_points(num_tokens: int, table_sizes: list[int], dedicated_rows: list[int]) -> list[Point]:
    """List all points; those that say most come first, in case the time ends.

    Args:
        num_tokens: N.
        table_sizes: M of clustered codes; the first is also that of the points with dedicated rows.
        dedicated_rows: F; the learning rate is chosen on the first.

    Raises:
        UserError: tables that are too small for N tokens.
    """
    least = smallest_base(num_tokens, NUM_TABLES)
    for size in table_sizes:
        if size < least:
            raise UserError(
                f"--table-sizes {size}: {NUM_TABLES} tables of {size} rows code {size**NUM_TABLES:,} tokens, the "
                f"tokenizer has {num_tokens:,}; give at least {least}"
            )
    first, *others = table_sizes
    return [
        Point("plain"),
        Point("clustered", first),
        *(Point("dedicated", first, rows) for rows in dedicated_rows),
        Point("positional", least),
        *(Point("clustered", size) for size in others),
        *(Point("positional", size) for size in others if size > least),
    ]
