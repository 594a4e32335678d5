"""Tokenizers without mask and padding, GPT-2's kind and Llama's: from text to a causal model that writes."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksub_ds import positional_codes
from ksub_ds.analysis.encoders import open_encoder
from ksub_ds.analysis.sample import batches, sample_text
from ksub_ds.cli import main as ksub
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import read_lines
from ksub_ds.convert.export import export_run
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.shards.writer import split_of
from ksub_ds.corpus.text.pipeline import ShardText, shard_text
from ksub_ds.pretrain.__main__ import main

pytestmark = pytest.mark.timeout(300)

LENGTH, HELD_OUT = 64, 0.1
MARKS = {"gpt2": ("<|endoftext|>", "<|endoftext|>"), "llama": ("<s>", "</s>")}


class Made(NamedTuple):
    """What was made with a tokenizer."""

    kind: str
    tokenizer: Path
    shards: Path
    run: Path


@pytest.fixture(scope="module", params=list(MARKS))
def made(request: Any, causal_tokenizers: dict[str, Path], tiny_text: Path, tmp_path_factory: Any) -> Made:
    """Shards, and a run of three steps with every held-out row evaluated."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), causal_tokenizers[request.param]
    shards, codes, run = folder / "shards", folder / "codes.safetensors", folder / "run"
    shard_text(ShardText(tiny_text, tokenizer, shards, LENGTH, HELD_OUT, workers=1))
    positional_codes(len(AutoTokenizer.from_pretrained(tokenizer)), 3).save(codes)
    words = ["--preset", "llama_tiny", "--objective", "clm", "--codes", codes, "--data", shards, "--out", run]
    size = ["--max-steps", 3, "--eval-every", 3, "--eval-sequences", 10**6, "--global-batch-size", 4]
    assert main([*map(str, [*words, *size])]) == 0
    return Made(request.param, tokenizer, shards, run)


def held_out(text: Path, language: str) -> list[str]:
    lines = (text / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return [each for each in documents if split_of(each.encode(), HELD_OUT) == "validation"]


def rows_of(documents: list[str], tokenizer: Any) -> list[list[int]]:
    """Rows as docs/data.md describes them, by transformers' tokenizer, the last one without padding."""
    stream: list[int] = []
    for text in documents:
        stream += [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    bodies = [stream[1:][first : first + LENGTH - 2] for first in range(0, len(stream) - 1, LENGTH - 2)]
    return [[tokenizer.bos_token_id, *body, tokenizer.eos_token_id] for body in bodies]


def test_rows_are_those_of_transformers_ids(made: Made, tiny_text: Path) -> None:
    tokenizer, dataset = AutoTokenizer.from_pretrained(made.tokenizer), ShardDataset.open(made.shards)
    assert (tokenizer.bos_token, tokenizer.eos_token) == MARKS[made.kind]
    facts = dataset.manifest["tokenizer"]
    assert (facts["pad_id"], facts["mask_id"]) == (None, None)
    for language in dataset.languages:
        expected = rows_of(held_out(tiny_text, language), tokenizer)
        rows = dataset.gather("validation", np.arange(len(expected)), language)
        expected[-1] += [tokenizer.eos_token_id] * (LENGTH - len(expected[-1]))
        assert rows.tolist() == expected


def test_loss_and_bits_per_byte_are_those_of_the_dense_model(made: Made, tiny_text: Path, tmp_path: Path) -> None:
    """Row by row without any padding; the bytes are those of the documents themselves."""
    model = AutoModelForCausalLM.from_pretrained(export_run(made.run, tmp_path / "dense", form="dense")).double()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    (scores,) = read_lines(made.run / "evaluation.jsonl")[-1:]
    for language, found in scores["languages"].items():
        documents, nats, count = held_out(tiny_text, language), 0.0, 0
        for row in map(torch.tensor, rows_of(documents, tokenizer)):
            with torch.no_grad():
                nats += F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum").item()
            count += len(row) - 1
        # Llama's puts a blank before every document.
        num_bytes = sum(len(text.encode()) + (made.kind == "llama") for text in documents)
        assert (found["count"], found["bytes"]) == (count, num_bytes)
        assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
        assert "unknown_tokens" not in found  # the end of a document is not one, though GPT-2 calls it so


def test_all_exports_write_the_same_and_are_scored(made: Made, tiny_text: Path, tmp_path: Path) -> None:
    written, scored = {}, {}
    for form in ("ksub", "dense", "remote-code"):
        folder = export_run(made.run, tmp_path / form, form=form)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=form == "remote-code").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.pad_token_id is None and model.config.eos_token_id == tokenizer.eos_token_id
        prompt = tokenizer("The old house", return_tensors="pt")
        written[form] = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
        if form == "remote-code":
            continue
        out = tmp_path / f"{form}-lm"
        words = ["--model", folder, "--data", tiny_text, "--out", out, "--window", 24, "--context", 8]
        assert ksub([*map(str, ["evaluate", "lm", *words, "--languages", "tr", "--max-documents", 3])]) == 0
        scored[form] = json.loads((out / "results.json").read_text())["languages"]["tr"]
    assert written["ksub"] == written["dense"] == written["remote-code"]
    assert scored["ksub"]["bits_per_byte"] == pytest.approx(scored["dense"]["bits_per_byte"], rel=1e-5)


def test_rows_of_an_analysis_are_filled_with_the_end_token(made: Made, tiny_text: Path) -> None:
    tokenizer = open_encoder(str(made.run), "run").tokenizer
    sample = sample_text(tiny_text, ("tr",), tokenizer, 200, 32)
    for batch in batches(sample, tokenizer, 64):
        assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.eos_id).all()
        assert batch.ordinary.sum() == sum(len(row) - 2 for row in sample.rows)


def test_masks_are_refused_in_one_line(
    made: Made, parallel_text: Path, tiny_text: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["--preset", "tiny", "--plain", "--data", made.shards, "--out", tmp_path / "run", "--max-steps", 2]
    for objective in ("mlm", "tlm"):
        assert main([*map(str, words), "--objective", objective]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "mask token" in each]
        assert re.search(r"--data .*shards: its tokenizer has no mask token, .* --objective clm", line)
    with pytest.raises(UserError, match=r"--parallel .*: pairs are for masked models, and .* has no mask token"):
        shard_text(ShardText(tiny_text, made.tokenizer, tmp_path / "pairs", parallel=parallel_text, workers=1))


def test_such_a_model_goes_on(made: Made, tmp_path: Path) -> None:
    model = export_run(made.run, tmp_path / "model")
    words = ["--preset", "llama_tiny", "--warm-start", model, "--data", made.shards, "--out", tmp_path / "more"]
    assert main([*map(str, [*words, "--max-steps", 2, "--global-batch-size", 4])]) == 0
