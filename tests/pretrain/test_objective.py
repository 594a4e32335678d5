"""Causal language models: losses of the dense model in float64, rank-free, resumed bit for bit, bits per byte."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ksub_ds import compress, positional_codes
from ksub_ds.analysis.run_files import read_run
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import read_lines
from ksub_ds.convert.export import export_run
from ksub_ds.corpus.batches import HeldOutBatches, TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.corpus.tokenizers.loading import load_tokenizer
from ksub_ds.pretrain.__main__ import main
from ksub_ds.pretrain.open_run import open_run
from ksub_ds.pretrain.recipe import Recipe, changed_keys, from_json, resolve, to_json
from ksub_ds.pretrain.resolved_run import open_sources, resolve_settings

from .runs import Bench, losses, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]  # three starts of ranks

CAUSAL: dict[str, Any] = {"preset": "llama_tiny", "max_steps": 6, "save_every_steps": 3, "eval_every": 3}
CAUSAL |= {"eval_sequences": 3}


@pytest.fixture(scope="module")
def causal(bench: Bench) -> Callable[[str], Path]:
    """`clm` and others on one rank, the continuation of `clm`, and on two ranks `two` and `zero3`."""
    one = {"clm": {}, "zero0": {"deepspeed": "zero0"}, "zero2": {"deepspeed": "zero2"}, "plain": {"codes": None}}
    one |= {"bias": {"decoder_bias": "frequency", "max_steps": 3}}
    more = {"plain": ["--plain"]}
    entries = [bench.arguments(f"clm-{name}", *more.get(name, []), **CAUSAL | one[name]) for name in one]
    assert bench.run_all(1, [{"arguments": each} for each in entries]) == [[0]] * len(one)
    bench.copy("clm-clm", "clm-continued", 3)
    assert bench.run_all(1, [{"arguments": bench.arguments("clm-continued", **CAUSAL)}]) == [[0]]
    two = {"two": {}, "zero3": {"deepspeed": "zero3"}}
    entries = [bench.arguments(f"clm-{name}", **CAUSAL | two[name]) for name in two]
    assert bench.run_all(2, [{"arguments": each} for each in entries]) == [[0, 0]] * 2
    return lambda name: bench.folder / f"clm-{name}"


def dense_sums(model: LlamaForCausalLM, batch: dict[str, np.ndarray]) -> tuple[float, int, list[int]]:
    """The summed loss of a batch's next tokens by the dense model in float64, the correct ones, and the tokens."""
    ids, labels = (torch.from_numpy(batch[key]) for key in ("input_ids", "labels"))
    mask = torch.from_numpy(batch["attention_mask"]) if "attention_mask" in batch else None
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1][labels[:, 1:] != -100]
    targets = labels[:, 1:][labels[:, 1:] != -100]
    loss = F.cross_entropy(logits, targets, reduction="sum").item()
    return loss, int((logits.argmax(1) == targets).sum()), targets.tolist()


def spelled_bytes(tokens: list[int], dataset: ShardDataset) -> int:
    """UTF-8 bytes of the text of tokens, with the blank of the first one; special tokens spell nothing."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    ordinary = [token for token in tokens if token not in tokenizer.special_ids]
    return len(tokenizer.decode([tokenizer.unk_id, *ordinary]).removeprefix("<unk>").encode())


def test_a_step_and_an_evaluation_are_those_of_the_dense_model_in_float64(
    causal: Callable[[str], Path], bench: Bench, tmp_path: Path
) -> None:
    dataset = ShardDataset.open(bench.data)
    for name in ("clm", "plain"):
        dense = export_run(causal(name), tmp_path / name, step=3, form="dense")
        model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float64).eval()
        batch = TrainingBatches(dataset, 8, 1.0, 0, None).batch(3, 0, 8)  # of step 4
        loss, _, tokens = dense_sums(model, batch)
        real = batch["input_ids"][:, 1:] != dataset.manifest["tokenizer"]["pad_id"]
        assert len(tokens) == real.sum(), "every token but the first of a row is predicted"
        assert losses(causal(name))[3] == pytest.approx(loss / len(tokens), rel=2e-6)

        line = next(line for line in read_lines(causal(name) / "evaluation.jsonl") if line["step"] == 3)
        sums = {language: np.zeros(4) for language in line["languages"]}
        for language, batch in HeldOutBatches(dataset, 3, None, batch_size=2):
            loss, correct, tokens = dense_sums(model, batch)
            sums[language] += [loss, correct, len(tokens), spelled_bytes(tokens, dataset)]
        rows = [*line["languages"].items(), (None, line)]
        for language, scores in rows:
            loss, correct, count, size = sums[language] if language else sum(sums.values())
            assert scores["loss"] == pytest.approx(loss / count, rel=2e-6)
            assert scores["next_token_accuracy"] == correct / count and scores["bytes"] == size
            assert scores["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=2e-6)


def test_a_resumed_run_is_the_same_bit_for_bit(causal: Callable[[str], Path]) -> None:
    assert losses(causal("clm")) == losses(causal("continued"))
    assert state_bytes(causal("clm"), 6) == state_bytes(causal("continued"), 6)


@pytest.mark.parametrize("name", ["zero0", "zero2", "two", "zero3"])
def test_ranks_and_stages_agree(causal: Callable[[str], Path], name: str) -> None:
    assert losses(causal(name)) == pytest.approx(losses(causal("clm")), rel=2e-5)
    for ours, theirs in zip(*(read_lines(causal(each) / "evaluation.jsonl") for each in (name, "clm")), strict=True):
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=2e-5)


def test_what_a_run_writes(causal: Callable[[str], Path]) -> None:
    recipe = json.loads((causal("clm") / "recipe.json").read_text())
    assert recipe["objective"] == "clm" and losses(causal("clm"))[-1] < losses(causal("clm"))[0]
    log = (causal("clm") / "train.log").read_text()
    assert "next token accuracy" in log and "bits per byte" in log and "masked" not in log
    model = open_run(causal("bias")).checkpoint(3).load_model()
    assert model.decoder_bias is not None and losses(causal("bias"))[0] < losses(causal("clm"))[0] - 0.5
    with pytest.raises(UserError, match=r"--dense: .*bias per token"):
        export_run(causal("bias"), causal("bias") / "dense", form="dense")


def recipe(preset: Any, **settings: Any) -> Recipe:
    return Recipe(preset, Path("shards"), Path("run"), codes=Path("codes.safetensors"), **settings)


@pytest.mark.parametrize(
    ("preset", "settings", "objective", "share"),
    [
        ("tiny", {}, "mlm", 0.0),
        ("tiny", {"tlm_share": 0.5}, "mlm", 0.5),
        ("tiny", {"objective": "tlm"}, "tlm", 1.0),
        ("tiny", {"tlm_share": 1.0}, "tlm", 1.0),
        ("llama_tiny", {}, "clm", 0.0),
        ("llama_medium", {"objective": "clm"}, "clm", 0.0),
    ],
)
def test_objectives(preset: str, settings: dict[str, Any], objective: str, share: float) -> None:
    found = resolve(recipe(preset, **settings), 1, on_gpu=False)
    assert (found.objective, found.tlm_share) == (objective, share)
    assert found == resolve(found, 1, on_gpu=False), "what --extend reads back"
    older = {key: value for key, value in to_json(found).items() if key != "objective"}
    assert changed_keys(older, to_json(found)) == [] and from_json(older, Path("recipe.json")) == found


def test_the_medium_llama_has_the_schedule_of_table_5() -> None:
    found = resolve(recipe("llama_medium"), 1, on_gpu=True)
    assert (found.max_steps, found.warmup_steps, found.peak_lr) == (250_000, 24_000, 2e-4)
    assert found.global_batch_size == 256


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("tiny", {"objective": "clm"}, "--preset tiny is an encoder.* --preset llama_medium or llama_small or llama_"),
        ("llama_tiny", {"objective": "mlm"}, "--preset llama_tiny is a causal network.* leave --objective out"),
        ("llama_tiny", {"objective": "tlm"}, "--objective tlm: --preset llama_tiny is a causal network"),
        ("llama_tiny", {"tlm_share": 0.5}, r"--tlm-share 0\.5: belongs to masked models; --preset llama_tiny learns"),
        ("llama_tiny", {"distill_from": "teacher"}, "--distill-from teacher: belongs to masked models"),
        ("llama_tiny", {"mlm_probability": 0.3}, r"--mlm-probability 0\.3: belongs to masked models"),
        ("tiny", {"objective": "tlm", "tlm_share": 0.5}, r"--tlm-share 0\.5: --objective tlm trains on pairs only"),
    ],
)
def test_contradictions(preset: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(recipe(preset, **settings), 1, on_gpu=False)
    assert "\n" not in str(caught.value)


def test_a_warm_start_of_the_other_kind(causal: Callable[[str], Path], bench: Bench, tmp_path: Path) -> None:
    export_run(causal("clm"), tmp_path / "model")
    settings = Recipe("tiny", bench.data, tmp_path / "run", warm_start=tmp_path / "model")
    with pytest.raises(UserError, match=r"KSubLlamaForCausalLM, but --preset tiny learns mlm; .*--preset llama_medium"):
        open_sources(resolve_settings(settings))
    found = open_sources(resolve_settings(dataclasses.replace(settings, preset="llama_tiny")))
    assert found.table.sha256 == open_run(causal("clm")).table.sha256


def test_a_compressed_model_goes_on(bench: Bench, tmp_path: Path) -> None:
    """What `ksub compress` makes of a causal model is a warm start, also one whose decoder has tables of its own."""
    size = ShardDataset.open(bench.data).manifest["tokenizer"]["vocab_size"]
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=size, **fields, tie_word_embeddings=False, pad_token_id=1))
    model = compress(plain, positional_codes(size, 3))
    model.save_pretrained(tmp_path / "model")
    arguments = bench.arguments(
        "clm-warm", **CAUSAL | {"codes": None, "warm_start": tmp_path / "model", "max_steps": 2, "eval_every": 0}
    )
    assert main(arguments) == 0 and len(losses(bench.folder / "clm-warm")) == 2
    counted = read_run(bench.folder / "clm-warm").parameters
    assert (counted["total"], counted["total_plain"]) == (model.num_parameters(), plain.num_parameters())
