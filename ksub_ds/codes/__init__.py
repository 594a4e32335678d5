"""The map from a token id to its K codes: code tables, both allocation algorithms, the trie of the codes."""

from ksub_ds.codes.clustering import clustered_codes
from ksub_ds.codes.positional import plain_codes, positional_codes
from ksub_ds.codes.table import CodeTable, reserve_special_tokens

__all__ = ["CodeTable", "clustered_codes", "plain_codes", "positional_codes", "reserve_special_tokens"]
