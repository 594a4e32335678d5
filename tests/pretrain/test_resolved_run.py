"""Codes and data that do not fit the model are refused before the run folder is claimed."""

from pathlib import Path

import pytest

from ksub_ds.cli import main as ksub
from ksub_ds.codes.positional import positional_codes
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.roberta import KSubRobertaForMaskedLM
from ksub_ds.pretrain.__main__ import main
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.resolved_run import ResolvedRun, open_sources, resolve_settings

from .runs import Bench


def opened(recipe: Recipe) -> ResolvedRun:
    return open_sources(resolve_settings(recipe))


def test_more_tables_than_columns(bench: Bench, tmp_path: Path) -> None:
    num_tokens = opened(Recipe("tiny", bench.data, tmp_path / "run", bench.codes)).table.num_tokens
    for num_tables in (128, 129):
        positional_codes(num_tokens, num_tables).save(tmp_path / f"{num_tables}.safetensors")
    assert opened(Recipe("tiny", bench.data, tmp_path / "run", tmp_path / "128.safetensors"))
    with pytest.raises(UserError, match=r"129\.safetensors: K = 129 tables, .* d = 128") as caught:
        opened(Recipe("tiny", bench.data, tmp_path / "run", tmp_path / "129.safetensors"))
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_positions_leave_no_recipe(bench: Bench, tmp_path: Path) -> None:
    text, long = tmp_path / "text", tmp_path / "long"
    text.mkdir()
    (text / "en.txt").write_text("one two three\n\n" * 50)
    shard_text(ShardText(text, bench.data / "tokenizer", long, sequence_length=1024, validation_fraction=0.0))
    arguments = ["--preset", "tiny", "--codes", str(bench.codes), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    assert main([*arguments, "--data", str(long)]) == 2
    assert not (tmp_path / "run" / "recipe.json").exists(), "a corrected command would be refused"

    table = CodeTable.load(bench.codes)
    config = KSubRobertaConfig.tiny(vocab_size=table.num_tokens, max_position_embeddings=2000)
    model = KSubRobertaForMaskedLM(config, table)
    model.save_pretrained(tmp_path / "model")
    recipe = Recipe("tiny", long, tmp_path / "run", warm_start=tmp_path / "model")
    assert opened(recipe).warm_start_sha256, "its positions count, not the preset's"
    model.config.max_position_embeddings = 600
    model.config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="rows of 1024 tokens, but the model has positions for 598"):
        opened(recipe)


def test_other_codes_than_the_warm_start_s_are_fitted_first(bench: Bench, tmp_path: Path) -> None:
    table = CodeTable.load(bench.codes)
    KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=table.num_tokens), table).save_pretrained(tmp_path / "old")
    positional_codes(table.num_tokens, 2).save(other := tmp_path / "other.safetensors")
    recipe = Recipe("tiny", bench.data, tmp_path / "run", other, warm_start=tmp_path / "old")
    with pytest.raises(UserError, match=f"first: ksub compress {tmp_path / 'old'} --codes {other} --out MODEL"):
        opened(recipe)
    command = ["compress", str(tmp_path / "old"), "--codes", str(other), "--out", str(tmp_path / "new")]
    assert ksub(command) == 0
    recipe = Recipe("tiny", bench.data, tmp_path / "run", other, warm_start=tmp_path / "new")
    assert opened(recipe).table.sha256 == CodeTable.load(other).sha256


def test_shards_without_a_row_to_train_on(bench: Bench, tmp_path: Path) -> None:
    text, held_out = tmp_path / "text", tmp_path / "held-out"
    text.mkdir()
    (text / "en.txt").write_text("one two three\n\n")
    shard_text(ShardText(text, bench.data / "tokenizer", held_out, sequence_length=64, validation_fraction=0.999))
    with pytest.raises(UserError, match=r"--data .*held-out: holds no sequences to train on"):
        opened(Recipe("tiny", held_out, tmp_path / "run", bench.codes))


def test_codes_for_the_input_alone_are_refused(bench: Bench, tmp_path: Path) -> None:
    table = CodeTable.load(bench.codes)
    CodeTable(table.codes, table.table_sizes, unique=False).save(tmp_path / "input.safetensors")
    with pytest.raises(UserError, match=r"--codes .*input\.safetensors: tokens share codes"):
        opened(Recipe("tiny", bench.data, tmp_path / "run", tmp_path / "input.safetensors"))
