"""What comes after a causal run: exports, vectors, the report, the watcher."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ksub_ds.analysis.run_report import write_report
from ksub_ds.common.errors import UserError
from ksub_ds.convert.export import export_run
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.evaluate.finetune.classifier import check_encoder
from ksub_ds.evaluate.lm.causal import check_causal
from ksub_ds.evaluate.watch import WatchSettings, watch
from ksub_ds.pretrain.__main__ import main
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.vectors.dedicated import summed_losses
from ksub_ds.vectors.model_vectors import export_vectors, run_vectors

from .runs import Bench


@pytest.fixture(scope="module")
def run(bench: Bench) -> Path:
    settings = {"max_steps": 4, "eval_every": 4, "save_every_steps": 4, "eval_sequences": 2, "log_every_steps": 2}
    assert main(bench.arguments("causal", **{"preset": "llama_tiny"} | settings)) == 0
    return bench.folder / "causal"


def test_exports_and_their_card(run: Path, tmp_path: Path) -> None:
    model, ids = open_run(run).checkpoint().load_model(), torch.tensor([[0, 9, 17, 30]])
    expected = model(ids).logits
    for form in ("ksub", "dense", "remote-code"):
        folder = export_run(run, tmp_path / form, form=form)
        opened = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form == "remote-code").eval()
        torch.testing.assert_close(opened(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert opened.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, 7)
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: text-generation" in card and "causal language modelling" in card
        assert "| | loss (nats) | next token accuracy | bits per byte |" in card and "masked" not in card


def test_the_card_of_a_run_with_unknown_tokens(run: Path, tmp_path: Path) -> None:
    """A language all of whose predicted tokens are unknown has no bytes, so no bits per byte."""
    copy = shutil.copytree(run, tmp_path / "run")
    line = json.loads((copy / "evaluation.jsonl").read_text().splitlines()[-1]) | {"unknown_tokens": 1234}
    first = min(line["languages"])
    del line["languages"][first]["bits_per_byte"]
    (copy / "evaluation.jsonl").write_text(json.dumps(line) + "\n")
    card = (export_run(copy, tmp_path / "model") / "README.md").read_text()
    row = next(each for each in card.splitlines() if each.startswith(f"| {first} |"))
    assert row.endswith(" % | |") and "the bytes of 1,234 unknown tokens are not known" in card


def test_vectors(run: Path, tmp_path: Path) -> None:
    expected = open_run(run).checkpoint().load_model().get_input_embeddings().dense_weight().detach().numpy()
    np.testing.assert_array_equal(run_vectors(run)[0], expected)
    np.testing.assert_array_equal(export_vectors(export_run(run, tmp_path / "model")), expected)


def test_the_report(run: Path, tmp_path: Path) -> None:
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in ("nats a predicted token", "Next token accuracy", "bits per byte", "clm"):
        assert words in page
    assert "masked" not in page.lower().split("<h3>recipe</h3>")[0]


def test_the_watcher(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(WatchSettings(run=run, out=tmp_path / "curve", once=True, eval_sequences=2))
    assert "next token accuracy" in (shown := capsys.readouterr().out) and "bits per byte" in shown
    with pytest.raises(UserError, match=r"--data facebook/xnli: .* trains a causal model"):
        watch(WatchSettings(run=run, out=tmp_path / "other", data="facebook/xnli", once=True))


def test_evaluations(run: Path, tmp_path: Path) -> None:
    model = str(export_run(run, tmp_path / "model"))
    assert check_causal(model).model_type == "ksub_llama"
    with pytest.raises(UserError, match="ksub_llama"):
        check_encoder(model)
    for check in (check_causal, check_encoder):
        with pytest.raises(UserError, match=r"causal: is a run folder; `ksub export .*causal --out MODEL` makes"):
            check(str(run))


def test_tokens_are_not_chosen_by_the_loss_of_a_causal_run(run: Path, bench: Bench) -> None:
    with pytest.raises(UserError, match="is a KSubLlamaForCausalLM; give a masked language model of ours"):
        summed_losses(run, ShardDataset.open(bench.data))
