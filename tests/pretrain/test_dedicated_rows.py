"""Tokens with rows of their own in a training run: every ZeRO stage gathers them for the loss, and a run resumes."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from ksub_ds import CodeTable, positional_codes
from ksub_ds.pretrain.open_run import open_run

from .runs import Bench, losses

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
FP32_SUMS = 2e-5  # as in test_repeatability
DEDICATED = [0, 3, *range(10, 60)]


def test_stages_agree_and_a_run_goes_on_at_another(bench: Bench) -> None:
    """The rows are read in the loss, outside of the embedding's forward, where stage 3 must gather them."""
    shared = CodeTable.load(bench.codes)
    table = CodeTable(shared.codes, shared.table_sizes, shared.metadata, dedicated=DEDICATED)
    table.save(bench.folder / "dedicated.safetensors")
    settings = {
        "codes": bench.folder / "dedicated.safetensors", "max_steps": 4, "save_every_steps": 2, "eval_every": 4,
        "eval_sequences": 2,
    }  # fmt: skip
    stages = {"dedicated-zero0": "zero0", "dedicated-zero3": "zero3", "dedicated-both": "zero3"}
    entries = [{"arguments": bench.arguments(name, deepspeed=stage, **settings)} for name, stage in stages.items()]
    entries[1]["shards"] = True
    entries[2]["stop_at"] = 2
    entries.append({"arguments": bench.arguments("dedicated-both", deepspeed="zero0", **settings)})
    _, (held,), *_, (ended,) = bench.run_all(1, entries)
    assert ended == 0
    name = "roberta.embeddings.word_embeddings.dedicated_rows"
    assert held[name][2] == len(DEDICATED) * 128, "a parameter that stage 3 cuts"

    expected = losses(bench.folder / "dedicated-zero0")
    for run in ("dedicated-zero3", "dedicated-both"):
        np.testing.assert_allclose(losses(bench.folder / run), expected, rtol=FP32_SUMS, err_msg=run)
    weights = {
        run: load_file(bench.folder / run / "checkpoints" / "global_step4" / "model.safetensors")
        for run in ("dedicated-zero0", *stages)
    }
    rows = weights["dedicated-zero0"][name]
    assert rows.shape == (len(DEDICATED), 128) and np.abs(rows).max() > 0
    for run, found in weights.items():
        np.testing.assert_allclose(found[name], rows, atol=2e-6, err_msg=run)
    model = open_run(bench.folder / "dedicated-both").checkpoint().load_model()
    assert model.code_table().sha256 == table.sha256 != positional_codes(table.num_tokens, 3).sha256
