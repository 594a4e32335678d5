"""Codes and data that do not fit the model are refused before the run folder is claimed."""

from pathlib import Path

import pytest

from ksub_ds.codes.positional import positional_codes
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.prepare import load_sources
from ksub_ds.pretrain.recipe import Recipe

from .conftest import Bench


def test_more_tables_than_columns(bench: Bench, tmp_path: Path) -> None:
    num_tokens = load_sources(Recipe("tiny", bench.data, tmp_path / "run", bench.codes)).table.num_tokens
    for num_tables in (128, 129):
        positional_codes(num_tokens, num_tables).save(tmp_path / f"{num_tables}.safetensors")
    assert load_sources(Recipe("tiny", bench.data, tmp_path / "run", tmp_path / "128.safetensors"))
    with pytest.raises(UserError, match=r"129\.safetensors: K = 129 tables, .* d = 128") as caught:
        load_sources(Recipe("tiny", bench.data, tmp_path / "run", tmp_path / "129.safetensors"))
    assert "\n" not in str(caught.value)
