"""Dedicated rows from the flag to the answer: codes, pretraining, resume, every export, compression, fine-tuning."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksub_ds import CodeTable
from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.convert.export import export_run
from ksub_ds.convert.onnx import NEEDS
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.pretrain.warm_start import codes_for, read_codes
from ksub_ds.vectors.dedicated import DedicatedChoice, choose_tokens
from ksub_ds.vectors.sources import load_vectors

from ..pretrain.runs import Bench, Outcome, environment, state_bytes
from .test_export_forms import LOGITS

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
ROWS = 40


@pytest.fixture(scope="module")
def codes(bench: Bench) -> Path:
    """A code file with the 40 most frequent tokens of the shards dedicated."""
    path = bench.folder / "dedicated.safetensors"
    tokenizer = str(bench.data / "tokenizer")
    command = ["codes", "positional", "--tokenizer", tokenizer, "--num-tables", "3", "--out", str(path)]
    assert main([*command, "--dedicated-rows", str(ROWS), "--data", str(bench.data)]) == 0
    return path


@pytest.fixture(scope="module")
def shared(bench: Bench, codes: Path) -> Path:
    """A model of the same codes without dedicated rows."""
    import torch

    from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM
    from ksub_ds.corpus.tokenizers.loading import load_tokenizer

    table = CodeTable.load(codes)
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=table.num_tokens, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    folder = bench.folder / "shared_model"
    model = KSubRobertaForMaskedLM(config, CodeTable(table.codes, table.table_sizes))
    with torch.no_grad():
        model.decoder_bias.normal_()
    model.save_pretrained(folder)
    load_tokenizer(bench.data / "tokenizer").save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(bench: Bench, codes: Path, shared: Path) -> Path:
    """Two steps in one go, and in two; and from the model without rows, with them and without."""
    two = {"codes": codes, "max_steps": 2, "save_every_steps": 1, "eval_every": 2, "peak_lr": 5e-3, "warmup_steps": 1}
    two |= {"eval_sequences": 2}
    whole, halves = (bench.arguments(name, **two) for name in ("rows-whole", "rows-halves"))
    warm = two | {"warm_start": shared}
    entries: list[dict[str, Any]] = [
        {"arguments": whole},
        {"arguments": halves, "stop_at": 1},
        {"arguments": halves},
        {"arguments": bench.arguments("rows-added", **warm)},
        {"arguments": bench.arguments("rows-none", **warm | {"codes": None})},
    ]
    outcomes: list[Outcome] = bench.run_all(1, entries)
    assert [outcome[0] for outcome in outcomes][2:] == [0, 0, 0] and outcomes[0] == [0]
    return bench.folder


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The run as a HuggingFace folder."""
    return export_run(runs / "rows-whole", runs / "rows-exported")


def test_a_resumed_run_is_the_run_in_one_go(runs: Path, codes: Path) -> None:
    assert state_bytes(runs / "rows-halves", 2) == state_bytes(runs / "rows-whole", 2)
    run = open_run(runs / "rows-whole")
    assert (
        run.record["codes_sha256"] == CodeTable.load(codes).sha256 == run.checkpoint().load_model().code_table().sha256
    )
    layer = run.checkpoint().load_model().get_input_embeddings()
    assert layer.dedicated_rows.abs().min(dim=1).values.gt(0).any(), "the rows are trained"
    log, parameters = (runs / "rows-whole" / "train.log").read_text(), run.table.num_parameters(128)
    assert re.search(rf"K = 3, {ROWS} dedicated +{parameters:,} ", log)


def test_a_warm_start_adds_rows_and_computes_what_it_did(runs: Path, shared: Path, codes: Path) -> None:
    first = [
        json.loads((runs / name / "evaluation.jsonl").read_text().splitlines()[0])
        for name in ("rows-added", "rows-none")
    ]
    assert first[0]["step"] == first[1]["step"] == 0
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    added = open_run(runs / "rows-added")
    assert added.checkpoint().load_model().code_table().sha256 == CodeTable.load(codes).sha256 == added.table.sha256
    assert open_run(runs / "rows-none").table.num_dedicated == 0


def test_a_warm_start_loses_no_row(exported: Path, codes: Path) -> None:
    own, table = read_codes(exported), CodeTable.load(codes)
    assert own.sha256 == table.sha256 == codes_for(exported, table, "codes").sha256
    fewer = CodeTable(table.codes, table.table_sizes, dedicated=table.dedicated[1:])
    with pytest.raises(
        UserError, match=rf"--codes x: lack 1 of the {ROWS} dedicated tokens .*token {own.dedicated[0]}\)"
    ):
        codes_for(exported, fewer, "x")
    with pytest.raises(UserError, match="are not the codes of --warm-start"):
        codes_for(exported, CodeTable(table.codes[:, ::-1], table.table_sizes), "x")


def test_every_form_has_the_same_logits(runs: Path, exported: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    export_run(runs / "rows-whole", tmp_path / "remote", form="remote-code")
    export_run(exported, tmp_path / "dense", form="dense")
    card = (exported / "README.md").read_text()
    assert f"{ROWS} tokens have a row of their own" in card and f"dedicated by: {ROWS} most frequent of" in card
    model = AutoModelForMaskedLM.from_pretrained(exported).eval()
    ids = torch.arange(5, 37).reshape(2, 16)
    with torch.no_grad():
        expected = model(ids).logits.double().flatten()[::97].tolist()
        model.get_input_embeddings().dedicated_rows.zero_()
        without = model(ids).logits.double().flatten()[::97].tolist()
    assert np.abs(np.subtract(expected, without)).max() > 1e-3, "the rows matter"
    command = [sys.executable, "-c", LOGITS, str(tmp_path / "remote"), str(tmp_path / "dense")]
    settings = environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logits in json.loads(re.search(r"^found (.*)", done.stdout, re.M)[1]):
        assert logits == pytest.approx(expected, abs=1e-5), name
    if any(find_spec(name) is None for name in NEEDS):
        pytest.skip(f"the rest needs pip install {' '.join(NEEDS)}")
    export_run(exported, tmp_path / "onnx", onnx=True)  # compares, and raises when they differ


def test_vectors_and_losses_of_the_run_know_the_rows(runs: Path) -> None:
    run = runs / "rows-whole"
    vectors, _ = load_vectors(run)
    layer = open_run(run).checkpoint().load_model().get_input_embeddings()
    np.testing.assert_allclose(vectors, layer.dense_weight().detach().numpy(), rtol=1e-6)
    ids, _ = choose_tokens(DedicatedChoice(10, by_loss=run), len(vectors), None)
    assert len(ids) == 10


def test_compressed_with_rows_then_grown_and_fine_tuned(
    bench: Bench, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    small, words = tmp_path / "small", ["--num-tables", "2", "--table-size", "20", "--sequences", "1"]
    flags = ["--dedicated-rows", "25", "--data", str(bench.data)]
    assert main(["compress", str(exported), *words, *flags, "--out", str(small)]) == 0
    table, report = CodeTable.load(small / "codes.safetensors"), json.loads((small / "compression.json").read_text())
    assert table.num_dedicated == report["num_dedicated"] == 25 and len(report["loss"]) == 2
    model, theirs = (AutoModelForMaskedLM.from_pretrained(each) for each in (small, exported))
    kept = torch.tensor(table.dedicated).long()
    ours, old = (each.get_input_embeddings()(kept).detach() for each in (model, theirs))
    torch.testing.assert_close(ours, old, atol=1e-6, rtol=0)

    (tmp_path / "new.txt").write_text("Zürich\n水\n", encoding="utf-8")
    grown = tmp_path / "grown.safetensors"
    extend = ["codes", "extend", str(small / "codes.safetensors"), "--tokens", str(tmp_path / "new.txt")]
    assert main([*extend, "--out", str(grown)]) == 0
    model.resize_token_embeddings(table.num_tokens + 2)
    assert (model.code_table().codes == CodeTable.load(grown).codes).all()
    assert model.code_table().dedicated.tolist() == CodeTable.load(grown).dedicated.tolist() == table.dedicated.tolist()

    data = tmp_path / "reviews"
    data.mkdir()
    for name, count in (("train", 12), ("dev", 6)):
        rows = [
            {"text": f"the bird {('sings', 'walks')[i % 2]}", "label": ("good", "bad")[i % 2]} for i in range(count)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "classify", "--model", str(small), "--data", str(data), "--columns", "text"]
    settings = ["--epochs", "1", "--batch-size", "8", "--max-length", "16", "--out", str(tmp_path / "results")]
    assert main([*command, *settings]) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["model"]["num_dedicated"] == 25 and results["model"]["kind"] == "clustered, with dedicated rows"


def test_the_report_of_the_run_names_them(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "rows-whole"), "--html", str(tmp_path / "run.html")]) == 0
    page = (tmp_path / "run.html").read_text()
    assert f"sub-embedding tables and {ROWS} dedicated rows" in page and f", and {ROWS} dedicated<" in page
