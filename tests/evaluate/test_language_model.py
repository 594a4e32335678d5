"""`ksub evaluate lm` from files to tables: numbers against a plain loop, resumption, several models, refusals."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ksub_ds.cli import main
from ksub_ds.common.files import write_json
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT
from ksub_ds.corpus.text.sources import find_text
from ksub_ds.evaluate import language_model
from ksub_ds.evaluate.lm.documents import Choice, choose

WINDOW, CONTEXT = 24, 8


@pytest.fixture(scope="session")
def make_llama(tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Makes a plain Llama of two layers with random weights, and its tokenizer."""

    def make(name: str, seed: int) -> Path:
        folder = tmp_path_factory.mktemp("llamas") / name
        shutil.copytree(tiny_bpe, folder)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(AutoTokenizer.from_pretrained(tiny_bpe)), hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[[str, int], Path]) -> Path:
    """One of them."""
    return make_llama("llama", 0)


def command(model: Path | list[Path], data: Path, out: Path, *more: object) -> list[str]:
    models = model if isinstance(model, list) else [model]
    fixed = ["evaluate", "lm", "--model", *models, "--data", data, "--out", out, "--window", WINDOW]
    return [str(part) for part in [*fixed, "--context", CONTEXT, *more]]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@torch.no_grad()
def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """A plain loop, token by token, written apart from the code under test."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval().double(),
        AutoTokenizer.from_pretrained(folder),
    )
    bits = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        last = len(ids) - 1
        scored = 0
        while scored < last:
            until = min(scored + (WINDOW if scored == 0 else WINDOW - CONTEXT + 1), last)
            begin = max(0, until - WINDOW)
            chances = torch.log_softmax(model(torch.tensor([ids[begin:until]])).logits[0], dim=-1)
            while scored < until:
                bits -= float(chances[scored - begin, ids[scored + 1]]) / math.log(2)
                scored += 1
    return bits / sum(len(text.encode()) for text in texts)


def test_bits_per_byte_are_those_of_a_plain_loop(llama: Path, tiny_text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(command(llama, tiny_text, out, "--bytes-per-language", 0, "--max-documents", 12)) == 0
    found = results(out)
    assert set(found["languages"]) == {"el", "en", "tr"}
    for language, scores in found["languages"].items():
        lines = (tiny_text / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        stored = json.loads((out / "documents.json").read_text())[language]
        sizes = stored["bytes"]
        chosen = choose(find_text(tiny_text)[language], DEFAULT_LAYOUT, Choice(num_documents=12)).texts
        assert len(chosen) == 12 and set(chosen) <= set(texts) and sizes == [len(text.encode()) for text in chosen]
        assert scores["bits_per_byte"] == pytest.approx(bits_per_byte(llama, chosen), rel=1e-6)
        assert scores["nats"] == pytest.approx(math.fsum(stored["nats"]))
        assert scores["nats_per_token"] * scores["tokens_per_byte"] / math.log(2) == pytest.approx(
            scores["bits_per_byte"]
        )
        assert scores["documents_not_restored"] == 0, "byte-level BPE loses nothing"
    mean = sum(each["bits_per_byte"] for each in found["languages"].values()) / 3
    assert found["average"] == pytest.approx(mean)
    told = capsys.readouterr().out
    assert "Bits per byte, windows of 24 tokens, context 8" in told and f"{mean:.3f}" in told


def test_an_ended_worker_loses_no_block_and_changes_no_bit(
    llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends once the sums of three blocks are saved; the next goes on from there, to the same bits."""
    monkeypatch.setattr(language_model, "BLOCK_CHARACTERS", 2_000)
    few = ("--languages", "en", "--max-documents", 60)
    state, saves = tmp_path / "ended" / "work" / "en" / "state.json", []

    def save_three(path: Path, value: Any) -> None:
        write_json(path, value)
        saves.append(path)
        if len(saves) == 3:
            raise SystemExit(137)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(language_model, "write_json", save_three)
        main(command(llama, tiny_text, tmp_path / "ended", *few))
    before = json.loads(state.read_text())
    assert 3 <= len(before["nats"]) < 60 and not (tmp_path / "ended" / "results.json").exists()
    seen: set[str] = set()
    real = language_model.CausalTokenizer.encode

    def encode(self: Any, texts: list[str]) -> Any:
        seen.update(texts)
        return real(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(language_model.CausalTokenizer, "encode", encode)
        assert main(command(llama, tiny_text, tmp_path / "ended", *few)) == 0
    assert len(seen) == 60 - len(before["nats"]), "what was saved is not scored again"
    assert main(command(llama, tiny_text, tmp_path / "whole", *few)) == 0
    ended, whole = (json.loads((tmp_path / name / "documents.json").read_text()) for name in ("ended", "whole"))
    assert ended == whole and ended["en"]["nats"][: len(before["nats"])] == before["nats"]
    assert not state.exists()


def test_models_are_joined_in_one_table(
    make_llama: Callable[[str, int], Path], tiny_text: Path, tmp_path: Path, capsys: Any
) -> None:
    models = [make_llama("one", 1), make_llama("two", 2)]
    out = tmp_path / "out"
    few = ("--max-documents", 9, "--languages", "en", "tr")
    assert main(command(models, tiny_text, out, *few)) == 0
    scores = [results(out / name) for name in ("one", "two")]
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    told = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in told.splitlines()
        if "|" in line
    }
    for each, name in zip(scores, ("one", "two"), strict=True):
        bits = [each["languages"][language]["bits_per_byte"] for language in ("en", "tr")]
        assert rows[f"{name} (plain)"] == [f"{value:.3f}" for value in (*bits, each["average"])]
    *gap, mean, p = rows["two (plain) - one (plain)"]
    assert mean == f"{scores[1]['average'] - scores[0]['average']:+.3f}" and len(gap) == 2
    assert 0 < float(p) <= 1
    assert all(scores[0]["languages"][each]["bytes"] == scores[1]["languages"][each]["bytes"] for each in ("en", "tr"))
    # other windows are another table
    assert main(command(models[0], tiny_text, tmp_path / "wide", *few, "--context", 2)) == 0
    capsys.readouterr()
    assert main(["report", str(out / "one"), str(tmp_path / "wide"), "--format", "csv"]) == 0
    told = capsys.readouterr().out
    assert told.count("# Bits per byte, windows of 24 tokens") == 2 and "differences" not in told


def test_one_model_and_several_do_not_share_a_folder(
    llama: Path, make_llama: Callable[[str, int], Path], tiny_text: Path, tmp_path: Path, capsys: Any
) -> None:
    """A model alone has its results in OUT, several in OUT/<name>: both in one would count one of them twice."""
    other, few = make_llama("other", 1), ["--languages", "en", "--max-documents", "2"]
    for first, second, line in (
        (llama, [llama, other], "holds the evaluation of one model; for several give another folder"),
        ([llama, other], llama, "holds evaluations in folders (llama, other), as of several models; give --out"),
    ):
        out = tmp_path / str(isinstance(first, list))
        assert main(command(first, tiny_text, out, *few)) == 0
        before = sorted(out.rglob("*"))
        capsys.readouterr()
        assert main(command(second, tiny_text, out, *few)) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: --out {out}: {line}")
        assert sorted(out.rglob("*")) == before
        assert main(command(first, tiny_text, out, *few)) == 0
    assert main(command(llama, tiny_text, out / "llama", *few)) == 0


def test_a_language_without_text_is_named_and_left_out(llama: Path, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "text"
    data.mkdir()
    (data / "en.txt").write_text("the small old house\n\nthe river sings\n")
    (data / "tr.jsonl").write_text("no json at all\n")
    assert main(command(llama, data, tmp_path / "out")) == 0
    assert results(tmp_path / "out")["missing"] == ["tr"] and list(results(tmp_path / "out")["languages"]) == ["en"]
    assert "no readable document in tr" in capsys.readouterr().out


def test_a_language_whose_documents_give_no_token_is_named_and_left_out(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLM-R's tokenizer gives a document of zero-width spaces bytes, but no token to predict."""
    data, encode = tmp_path / "text", language_model.CausalTokenizer.encode
    data.mkdir()
    (data / "en.txt").write_text("the small old house\n\nthe river sings\n")
    (data / "tr.txt").write_text("\u200b\u200b\n", encoding="utf-8")

    def without(self: Any, texts: list[str]) -> Any:
        return [
            dataclasses.replace(each, ids=each.ids[:1]) if "\u200b" in text else each
            for each, text in zip(encode(self, texts), texts, strict=True)
        ]

    monkeypatch.setattr(language_model.CausalTokenizer, "encode", without)
    assert main(command(llama, data, tmp_path / "out")) == 0
    assert results(tmp_path / "out")["missing"] == ["tr"] and list(results(tmp_path / "out")["languages"]) == ["en"]


def test_what_is_wrong_is_one_line(llama: Path, tiny_model: Path, tiny_text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"

    def told(model: Path, *more: object, data: Path = tiny_text) -> str:
        assert main(command(model, data, out, *more)) == 2 and not (out / "queue").exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    assert "is a masked language model or its encoder (ksub_roberta)" in told(tiny_model)
    assert "--window 65: " in (line := told(llama, "--window", 65)) and "has positions for 64 tokens" in line
    assert "--context 25: must be at most --window (24)" in told(llama, "--context", 25)
    assert "--held-out 1.0: must lie between 0 and 1" in told(llama, "--held-out", 1)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    assert "holds token shards" in told(llama, data=tmp_path / "shards")
    assert "holds no such language" in told(llama, "--languages", "fr")
    assert "is not a model folder" in told(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(bare)
    assert "holds no tokenizer" in told(bare)
    assert main(command(llama, tiny_text, out, "--languages", "tr", "--max-documents", 2)) == 0
    capsys.readouterr()
    assert main(command(llama, tiny_text, out, "--languages", "tr", "--max-documents", 3)) == 2
    assert "holds an evaluation with other settings (settings.num_documents: 2 -> 3)" in capsys.readouterr().err


def test_a_diverged_model_is_named(llama: Path, tiny_text: Path, tmp_path: Path, capsys: Any) -> None:
    broken = shutil.copytree(llama, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    assert main(command(broken, tiny_text, tmp_path / "out", "--languages", "tr")) == 2
    assert "gives no finite probability to tr: it has diverged" in capsys.readouterr().err
