"""Tables that only the input reads: sizes from a target, the compressed folder, and what no such model can do."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5EncoderModel,
)

from ksub_ds.cli import main
from ksub_ds.codes.inspection import describe
from ksub_ds.codes.table import CodeTable
from ksub_ds.common.errors import UserError
from ksub_ds.convert.compress_command import CompressModel, compress_model
from ksub_ds.convert.input_only import InputForm, fit_form, fit_to_error, form_of_ratio
from ksub_ds.convert.token_counts import count_tokens, read_documents
from ksub_ds.corpus.text.pipeline import ShardText, shard_text

WIDTH, COUNT = 24, 600
SIZE = {
    "vocab_size": COUNT,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def words(count=COUNT, width=WIDTH, seed=0):
    draw = np.random.default_rng(seed)
    coarse, fine = draw.standard_normal((6, width)), draw.standard_normal((12, width))
    parts = coarse[draw.integers(6, size=count)] + 0.5 * fine[draw.integers(12, size=count)]
    return (parts + 0.3 * draw.standard_normal((count, width)) + 1).astype(np.float32)


def relative_error(vectors, dense, weights):
    mean = weights @ vectors / weights.sum()
    return (weights @ np.square(vectors - dense).sum(1)) / (weights @ np.square(vectors - mean).sum(1))


def write_model(folder, head=AutoModel, family="bert"):
    torch.manual_seed(0)
    model = head.from_config(AutoConfig.for_model(family, **SIZE)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(words()))
    model.save_pretrained(folder)
    return model


@settings(max_examples=200, deadline=None)
@given(st.integers(16, 300_000), st.integers(4, 1024), st.floats(1.01, 300), st.sampled_from([2, 4]))
def test_a_ratio_is_kept_and_its_bytes_are_used(count, width, ratio, itemsize):
    """The codes take what is left of the budget: one table more would not fit."""
    budget = count * width * itemsize / ratio
    try:
        form = form_of_ratio(ratio, count, width, itemsize)
    except UserError as error:
        assert budget < 16 * width * itemsize + count and "hold no code per token" in str(error)
        return

    def size(num_tables):
        table = CodeTable(np.zeros((1, num_tables), int), (form.table_size,) * num_tables, unique=False)
        return (
            table.stored_bytes(width, itemsize, form.rotate * width * width) + (count - 1) * table.stored_codes.nbytes
        )

    assert 1 <= form.num_tables <= width and form.table_size <= max(16, count)
    assert size(form.num_tables) <= budget
    assert form.num_tables == width or size(form.num_tables + 1) > budget


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([0.5, 0.2, 0.05, 0.01]), st.booleans())
def test_an_error_is_reached_by_as_few_tables_as_do(target, weighted):
    vectors = words()
    weights = np.random.default_rng(0).integers(0, 9, COUNT) + 0.1 if weighted else np.ones(COUNT)
    table, fit = fit_to_error(vectors, target, weights, 4, table_size=64)
    rows = np.concatenate([part[table.codes[:, k]] for k, part in enumerate(fit.tables)], axis=1)
    dense = rows if fit.mixing is None else rows @ fit.mixing.T
    assert fit.error == pytest.approx(relative_error(vectors, dense, weights), rel=1e-3) and fit.error <= target
    if table.num_tables > 1:
        fewer = form_of_ratio(1.01, COUNT, WIDTH, 4, 64)
        fewer = type(fewer)(table.num_tables - 1, 64, fit.mixing is not None)
        assert fit_form(vectors, fewer, weights)[1].error > target
    with pytest.raises(UserError, match="24 tables of 4 rows, the most there can be, lose 0"):
        fit_to_error(vectors, 1e-6, weights, 4, table_size=4)


def test_a_table_for_every_column_has_no_rotation():
    """The rule of a ratio and that of an error are one."""
    form = form_of_ratio(1.01, 5000, WIDTH, 4)
    assert form.num_tables == WIDTH and form.rotate
    assert fit_form(words(), InputForm(WIDTH, 4, True), np.ones(COUNT))[1].mixing is None
    assert fit_form(words(), InputForm(WIDTH // 2, 4, True), np.ones(COUNT))[1].mixing is not None


def test_a_model_that_is_replaced_is_told_of(tmp_path, caplog):
    write_model(tmp_path / "plain")
    for ratio, told in (("4", False), ("8", True)):
        caplog.clear()
        options = ["--input-only", "--target-ratio", ratio, "--out", str(tmp_path / "small")]
        assert main(["compress", str(tmp_path / "plain"), *options]) == 0
        assert ("in place of the compressed model that was there" in caplog.text) is told


@pytest.mark.parametrize("wish", [["--target-ratio", "4"], ["--target-error", "0.1"], ["--num-tables", "8"]])
def test_a_compressed_encoder_is_its_dense_export(wish, tmp_path):
    """Saved, moved and loaded; bytes and error are those of the files."""
    model = write_model(tmp_path / "plain")
    command = ["compress", str(tmp_path / "plain"), "--input-only", *wish, "--out", str(tmp_path / "small")]
    assert main(command) == 0
    assert main(["export", str(tmp_path / "small"), "--dense", "--out", str(tmp_path / "dense")]) == 0
    assert "by product quantisation" in (tmp_path / "dense" / "README.md").read_text()
    shutil.move(tmp_path / "small", tmp_path / "moved")
    small, dense = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("moved", "dense"))
    ids = torch.randint(COUNT, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(small(ids).last_hidden_state, dense(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    report = json.loads((tmp_path / "moved" / "compression.json").read_text())
    matrix = dense.get_input_embeddings().weight.detach().numpy()
    assert report["error"] == pytest.approx(relative_error(words(), matrix, np.ones(COUNT)), rel=1e-3)
    assert report["input_only"] and report["embedding_bytes"][0] == COUNT * WIDTH * 4
    stored = load_file(tmp_path / "moved" / "model.safetensors")
    named = {name: value for name, value in stored.items() if "word_embeddings" in name}
    assert report["embedding_bytes"][1] == sum(value.nbytes for value in named.values())
    codes = next(value for name, value in named.items() if name.endswith("codes"))
    table = CodeTable.load(tmp_path / "moved" / "codes.safetensors")
    assert codes.dtype == torch.uint8 and codes.shape[1] == -(-table.num_tables * table.stored_bits // 8)
    assert (table.stored_codes == codes.numpy()).all()
    if wish[0] == "--target-ratio":
        assert report["embedding_bytes"][1] <= COUNT * WIDTH * 4 / 4
    if wish[0] == "--target-error":
        assert report["error"] <= 0.1
    assert type(model.get_input_embeddings()).__name__ == "Embedding"


@pytest.mark.parametrize(("num_tables", "rows"), [(8, 17), (4, 128)])
def test_a_model_of_the_earlier_form_is_to_be_made_again(tmp_path, capsys, num_tables, rows):
    """A byte a code, in fewer or in as many bytes as packed."""
    write_model(tmp_path / "plain")
    size = ["--num-tables", str(num_tables), "--table-size", str(rows)]
    small = tmp_path / "small"
    assert main(["compress", str(tmp_path / "plain"), "--input-only", *size, "--out", str(small)]) == 0
    table, weights = CodeTable.load(small / "codes.safetensors"), load_file(small / "model.safetensors")
    (name,) = (each for each in weights if each.endswith("codes"))
    weights[name] = torch.tensor(table.codes).to(torch.uint8)
    save_file(weights, small / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["export", str(small), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(r"error: .*(compress the original|make the model) again", told) and "pickle" not in told


def test_frequent_tokens_come_closer(tmp_path):
    """Counts from text: tokens by their frequency, and the text of any form."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_model(tmp_path / "plain")
    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(COUNT)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(tmp_path / "plain")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": " ".join(["w7 w8 w9"] * 5000)}) + "\n")
    errors = []
    for counts in ([], ["--counts", str(tmp_path / "text.jsonl")]):
        out = str(tmp_path / f"small{len(counts)}")
        assert (
            main(["compress", str(tmp_path / "plain"), "--input-only", *counts, "--target-ratio", "8", "--out", out])
            == 0
        )
        rows = AutoModel.from_pretrained(out).get_input_embeddings().dense_weight().detach().numpy()
        errors.append(np.square(rows - words())[7:10].sum())
    assert errors[1] < 0.5 * errors[0]


def test_counts_of_another_tokenizer_of_the_same_size_are_refused(tiny_bpe, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.txt").write_text("one two three\n\n" * 50)
    shard_text(ShardText(tmp_path / "text", tiny_bpe, tmp_path / "shards", sequence_length=32))
    shutil.copytree(tiny_bpe, tmp_path / "other")
    inner = json.loads((tiny_bpe / "tokenizer.json").read_text())
    first, *_, last = inner["model"]["merges"]
    inner["model"]["merges"][0], inner["model"]["merges"][-1] = last, first
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(inner))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    counts = count_tokens(tmp_path / "shards", tokenizer, len(tokenizer), "--distill", tiny_bpe)
    assert counts.sum() > 100
    with pytest.raises(UserError, match="not the tokenizer these shards were made with"):
        count_tokens(tmp_path / "shards", tokenizer, len(tokenizer), "--distill", tmp_path / "other")
    with pytest.raises(UserError, match=r"--distill .*shards: made with a tokenizer of"):
        count_tokens(tmp_path / "shards", tokenizer, len(tokenizer) - 1, "--distill", tiny_bpe)


def refused(capsys, *arguments):
    assert main(["compress", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert error.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize("number", [float("nan"), 1e21])
@pytest.mark.parametrize("form", [{"input_only": True, "target_ratio": 4.0}, {"num_tables": 3}])
def test_a_damaged_embedding_is_refused(tmp_path, number, form):
    write_model(tmp_path / "plain")
    model = AutoModel.from_pretrained(tmp_path / "plain")
    model.get_input_embeddings().weight.data[7, 3] = number
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"its embedding has a number that is NaN or beyond 1e\+15; fetch it anew"):
        compress_model(CompressModel(str(tmp_path / "plain"), tmp_path / "out", **form))
    assert not (tmp_path / "out").exists()


def test_what_has_no_input_only_form_is_one_line(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    write_model(tmp_path / "masked", AutoModelForMaskedLM)
    write_model(tmp_path / "plain")
    line = refused(capsys, tmp_path / "masked", "--input-only", *out)
    assert "is a BertForMaskedLM, which predicts tokens; leave the option out" in line
    T5EncoderModel(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    assert "T5" in refused(capsys, tmp_path / "t5", "--input-only", *out)
    shutil.copytree(tmp_path / "plain", tmp_path / "pickled")
    Path(tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "pickled ones are not read" in refused(capsys, tmp_path / "pickled", "--input-only", *out)
    for options, message in (
        (["--target-ratio", "5", "--target-error", "0.1"], "each says how many tokens keep their rows"),
        (["--input-only", "--target-ratio", "1"], "--target-ratio 1.0: must be greater than 1"),
        (["--input-only", "--target-ratio", "5", "--target-error", "0.1"], "each says how many tables there are"),
        (["--input-only", "--target-error", "10"], "--target-error 10: is a share of the variance, between 0 and 1"),
        (["--input-only", "--codes", "c"], "leave --codes out"),
        (["--input-only", "--mixing", "none"], "leave --mixing out"),
        (["--input-only", "--dedicated-rows", "5"], "leave --dedicated-rows out"),
        (["--input-only", "--minutes", "5"], "--minutes 5: is for --distill"),
        (["--input-only", "--target-ratio", "2", "--table-size", "500"], "table of 500 rows; leave --table-size out"),
        (["--input-only", "--seed", "99999999999"], "--seed 99999999999: must lie in 0..2147483647"),
        (["--seed", "-1"], "--seed -1: must lie in 0..2147483647"),
        (["--input-only", "--target-ratio", "100"], "the largest ratio for 600 x 24 is about 26"),
        (["--input-only", "--counts", str(tmp_path / "none")], "none: no such file or folder"),
        (["--input-only", "--counts", str(tmp_path / "plain")], "is text, and the model has no tokenizer"),
    ):
        assert message in refused(capsys, tmp_path / "plain", *options, *out)
    assert not (tmp_path / "out").exists()


def test_dedicated_rows_beside_such_codes_are_for_an_encoder(tmp_path, capsys):
    """`ksub codes dedicate` says so, and `ksub compress --codes` keeps the embedding of these tokens as it is."""
    write_model(tmp_path / "plain")
    (tmp_path / "ids.txt").write_text("3\n5\n")
    plain, small, codes, both = (str(tmp_path / name) for name in ("plain", "small", "codes", "both"))
    assert main(["compress", plain, "--input-only", "--target-ratio", "4", "--out", small]) == 0
    dedicate = ["codes", "dedicate", f"{small}/codes.safetensors", "--tokens", str(tmp_path / "ids.txt")]
    assert main([*dedicate, "--out", codes]) == 0
    assert "2 dedicated rows; codes for the input alone: ksub compress ENCODER --codes" in capsys.readouterr().out
    assert main(["compress", plain, "--codes", codes, "--out", both]) == 0
    assert "--input-only loses" not in capsys.readouterr().err
    ids = torch.tensor([3, 5, 7])
    before, after = (AutoModel.from_pretrained(path).get_input_embeddings()(ids).detach() for path in (plain, both))
    torch.testing.assert_close(after[:2], before[:2], atol=1e-6, rtol=0)
    assert (after[2] - before[2]).norm() > 1e-3


def test_no_decoder_reads_such_a_folder(tmp_path, capsys):
    write_model(tmp_path / "plain", AutoModelForSequenceClassification, "roberta")
    small = tmp_path / "small"
    assert main(["compress", str(tmp_path / "plain"), "--input-only", "--target-ratio", "4", "--out", str(small)]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(small)(torch.tensor([[3, 4]])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="KSubRobertaForMaskedLM: tokens share codes in an input-only embedding"):
        AutoModelForMaskedLM.from_pretrained(small)
    assert main(["codes", "inspect", str(small / "codes.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "none: the codes are for the input alone" in shown and "code space" not in shown
    assert "bytes at d = 24" in shown  # the model's own width, that nobody gave


def test_many_tables_are_described_in_few_words():
    table = CodeTable(np.arange(83 * 300).reshape(300, 83) % 200, (256,) * 83, unique=False)
    rows = dict(describe(table, 96))
    assert rows["table sizes (M_k)"] == "83 x 256" and "code space in use" not in rows
    stored = 300 * 83 + 4 * 256 * 96
    assert rows["bytes at d = 96"].startswith(f"{stored:,} in float32") and max(map(len, rows.values())) < 120


def test_text_that_is_left_out_is_told_also_where_enough_has_been_read(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a house"}\n{"text": "caf\xe9"}\n{"text": "a dog"}\n')
    reading = read_documents(tmp_path, "--counts")
    assert [next(reading), next(reading)] == ["a house", "a dog"]
    reading.close()
    assert f"--counts {tmp_path}: left out: not_utf8 1 (first: " in capsys.readouterr().err
