"""Export: a new process that knows only ksub_ds and transformers gets the numbers of the training model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.convert.export import compare_with_reload, export_run
from ksub_ds.pretrain.open_run import open_run

from ..pretrain.runs import Bench, Outcome, environment, losses

pytestmark = pytest.mark.timeout(300)
SCORE = """
import json, sys, torch, ksub_ds
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.arange(5, 37).reshape(2, 16)
with torch.no_grad():
    loss = model(ids, labels=ids.flip(1)).loss.item()
print(json.dumps([loss, model.num_parameters(), tokenizer.mask_token_id]))
"""


def test_exported_model_in_a_new_process(bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path) -> None:
    import torch

    run = open_run(bench.folder / "reference")
    out = export_run(run.folder.path, tmp_path / "model", step=15)
    model, tokenizer = run.checkpoint(15).load_model(), run.tokenizer
    ids = torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        expected = model(ids, labels=ids.flip(1)).loss.item()
    command = [sys.executable, "-c", SCORE, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    loss, parameters, mask_id = eval(done.stdout)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert (parameters, mask_id) == (sum(each.numel() for each in model.parameters()), tokenizer.mask_id)
    assert not list(tmp_path.glob(".*"))

    export_run(run.folder.path, out)  # over an earlier export: step 20 now
    newest = run.checkpoint().load_model()
    assert compare_with_reload(newest, out, tokenizer) < 1e-6
    assert compare_with_reload(model, out, tokenizer) > 1e-4


def test_plain_baseline_is_exported_too(bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path) -> None:
    out = export_run(bench.folder / "plain", tmp_path / "model")
    assert (out / "config.json").exists()


def test_another_network_is_read_by_all_that_read_runs(
    bench: Bench, one_rank: dict[str, Outcome], tiny_text: Path, tmp_path: Path
) -> None:
    """A run of ModernBERT: every form of export, the report and the analysis."""
    from ksub_ds.cli import main

    run = bench.folder / "modernbert"
    for form in ("native", "dense", "remote-code"):
        flag = [] if form == "native" else [f"--{form}"]
        assert main(["export", str(run), "--out", str(tmp_path / form), *flag]) == 0
    assert main(["report", str(run), "--html", str(tmp_path / "run.html")]) == 0
    assert "small_modernbert" in (tmp_path / "run.html").read_text()
    out = tmp_path / "analysis"
    language = sorted(path.name.split(".")[0] for path in tiny_text.iterdir())[0]
    sample = ["--data", str(tiny_text), "--languages", language, "--num-tokens", "300", "--points", "50"]
    assert main(["analyze", str(run), *sample, "--out", str(out)]) == 0
    assert (out / "explore.html").exists()


def test_roberta_path_from_text_to_a_filled_mask(bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path) -> None:
    """Byte-level BPE text, RoBERTa-MEDIUM at its real size, exported with a tokenizer that transformers opens."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    assert one_rank["roberta"] == [0]
    first, *_, last = losses(bench.folder / "roberta")
    assert last < first
    out = export_run(bench.folder / "roberta", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (8, 512)
    ids = torch.tensor([tokenizer(f"one two {tokenizer.mask_token} four")["input_ids"]])
    probabilities, best = model.predict_topk(ids, ids == tokenizer.mask_token_id, k=3)
    assert probabilities.shape == best.shape == (1, 3) and best.max() < len(tokenizer)
    assert torch.equal(best[0], model(ids).logits[ids == tokenizer.mask_token_id].topk(3).indices[0])
    (out / "checkpoint-500").mkdir()  # of a Trainer, say
    with pytest.raises(UserError, match="is an export, but holds 'checkpoint-500' too, which would be lost"):
        export_run(bench.folder / "roberta", out)
    (out / "checkpoint-500").rmdir()
    export_run(bench.folder / "roberta", out)


def test_refusals(bench: Bench, one_rank: dict[str, Outcome], tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    foreign = tmp_path / "foreign"  # a model, but no export
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "README.md").write_text("---\ntags:\n- mine\n---\n")
    for run, out, step, message in (
        (bench.data, tmp_path / "a", None, "no recipe.json"),
        (bench.folder / "reference", tmp_path, None, "not an export and not empty"),
        (bench.folder / "reference", foreign, None, "not an export and not empty"),
        (bench.folder / "reference", Path(), None, "is or holds the current folder"),
        (bench.folder / "reference", tmp_path / "a", 7, "there are checkpoints of step 20, 15, 10, 5"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(run, out, step)
    assert not (tmp_path / "a").exists() and len(list(foreign.iterdir())) == 2
