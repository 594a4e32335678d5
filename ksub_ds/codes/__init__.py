"""Floor 1: the map from a token id to its K codes."""

from ksub_ds.codes.positional import plain_codes, positional_codes
from ksub_ds.codes.table import CodeTable

__all__ = ["CodeTable", "plain_codes", "positional_codes"]
