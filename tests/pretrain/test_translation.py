"""Training with rows of pairs: rank-free, resumed bit for bit, evaluated per pair; refused where there are none."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from ksub_ds import positional_codes
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import read_lines
from ksub_ds.corpus.batches import PairSettings, TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.model.presets import fresh_model, preset_config
from ksub_ds.model.sequence_length import first_position
from ksub_ds.pretrain.prefetch import model_inputs, to_tensors
from ksub_ds.pretrain.recipe import Recipe, changed_keys, resolve, to_json
from ksub_ds.pretrain.resolved_run import open_sources, resolve_settings

from .runs import Bench, losses, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]  # three starts of ranks

SHORT: dict[str, Any] = {"max_steps": 6, "save_every_steps": 3, "eval_every": 3, "eval_sequences": 3}


@pytest.fixture(scope="module")
def pair_runs(bench: Bench, pair_shards: Path) -> Callable[[str], Path]:
    """`tlm` on one rank, its continuation, and on two ranks; `tlm-only`, which another share does not continue."""
    settings = SHORT | {"data": pair_shards, "tlm_share": 0.4}
    entries = [
        {"arguments": bench.arguments("tlm", **settings)},
        {"arguments": bench.arguments("tlm-only", **settings | {"tlm_share": 1.0, "max_steps": 3})},
    ]
    assert bench.run_all(1, entries) == [[0], [0]]
    bench.copy("tlm", "tlm-continued", 3)
    continued = [
        {"arguments": bench.arguments("tlm-continued", **settings)},
        {"arguments": bench.arguments("tlm-only", **settings | {"tlm_share": 0.9, "max_steps": 3})},
    ]
    done, refused = bench.run_all(1, continued)
    assert done == [0] and "tlm_share: 1.0 -> 0.9" in refused[0]
    assert bench.run_all(2, [{"arguments": bench.arguments("tlm-two", **settings)}]) == [[0, 0]]
    return lambda name: bench.folder / name


def test_a_resumed_run_is_the_same_bit_for_bit(pair_runs: Callable[[str], Path]) -> None:
    one, continued = pair_runs("tlm"), pair_runs("tlm-continued")
    assert losses(one) == losses(continued) and state_bytes(one, 6) == state_bytes(continued, 6)


def test_two_ranks_do_what_one_does(pair_runs: Callable[[str], Path]) -> None:
    assert losses(pair_runs("tlm-two")) == pytest.approx(losses(pair_runs("tlm")), rel=2e-5)


def test_pairs_are_evaluated_apart(pair_runs: Callable[[str], Path]) -> None:
    lines = list(read_lines(pair_runs("tlm") / "evaluation.jsonl"))
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        assert line["languages"].keys() == {"el", "en", "tr"} and line["pairs"].keys() == {"el+en", "en+tr"}
        rows = line["languages"].values()
        total = sum(row["loss"] * row["count"] for row in rows) / sum(row["count"] for row in rows)
        assert line["loss"] == pytest.approx(total)
    assert lines[-1]["pairs"]["en+tr"]["loss"] < lines[0]["pairs"]["en+tr"]["loss"]
    log = (pair_runs("tlm") / "train.log").read_text()
    assert "pairs: 0.4 of the rows, of el+en en+tr; positions of a translation start again" in log


def test_positions_are_those_that_the_model_counts_itself(pair_shards: Path) -> None:
    """Rows of one language get the states that they have without position_ids; those of pairs get others."""
    dataset = ShardDataset.open(pair_shards)
    tokenizer = dataset.manifest["tokenizer"]
    special = {f"{name}_token_id": tokenizer[f"{name}_id"] for name in ("pad", "bos", "eos")}
    for preset in ("tiny", "small_modernbert"):
        config = preset_config(preset, vocab_size=tokenizer["vocab_size"], **special)
        model = fresh_model(config, positional_codes(tokenizer["vocab_size"], 2)).eval()
        for share, same in ((1e-6, True), (1.0, False)):
            pairs = PairSettings(share, first_position=first_position(config))
            batches = TrainingBatches(dataset, 8, 1.0, 0, 0.15, pairs)
            batch = to_tensors(model_inputs(batches.batch(0, 0, 8), batches.rule, False), "cpu")
            with torch.no_grad():
                given = model(**batch).loss
                counted = model(**{key: value for key, value in batch.items() if key != "position_ids"}).loss
            assert torch.equal(given, counted) == same
    padded = torch.tensor([[0, 9, 2, 1, 1]])
    roberta = RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=1)
    expected = RobertaModel(roberta).embeddings.create_position_ids_from_input_ids(padded, 1)
    assert expected.tolist() == [[2, 3, 4, 1, 1]] and first_position(roberta) == 2


def test_recipe(tiny_shards: Path, bench: Bench, tmp_path: Path) -> None:
    recipe = Recipe("tiny", tiny_shards, tmp_path / "run", codes=bench.codes)
    assert not {"tlm_share", "reset_positions"} & to_json(recipe).keys()  # as older versions wrote it
    mixed = dataclasses.replace(recipe, tlm_share=0.5)
    assert changed_keys(to_json(recipe), to_json(mixed)) == ["tlm_share: 0.0 -> 0.5"]
    with pytest.raises(UserError, match=r"--tlm-share 1\.5: must lie in \[0, 1\]"):
        resolve(dataclasses.replace(recipe, tlm_share=1.5), 1, False)
    with pytest.raises(UserError, match=r"--tlm-share 0\.5: .* holds no pairs .*--parallel"):
        open_sources(resolve_settings(mixed))
