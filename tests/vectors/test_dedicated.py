"""Tokens with rows of their own: chosen by counts, by a list and by loss, with `ksub codes` and in its files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ksub_ds import CodeTable, KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.corpus import statistics
from ksub_ds.corpus.batches import HeldOutBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.pretrain.prefetch import to_tensors
from ksub_ds.vectors.dedicated import DedicatedChoice, choose_tokens, read_token_ids, summed_losses, with_dedicated
from ksub_ds.vectors.model_vectors import export_vectors


def counted(shards):
    """How often each token occurs in the training part, special tokens aside."""
    dataset = ShardDataset.open(shards)
    rows = np.concatenate([dataset.rows("train", language).ravel() for language in dataset.languages])
    tokenizer = dataset.manifest["tokenizer"]
    counts = np.bincount(rows, minlength=tokenizer["vocab_size"])
    counts[tokenizer["special_ids"]] = 0
    return counts


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_shards):
    """A working folder with codes for the tokens of tiny_shards."""
    monkeypatch.chdir(tmp_path)
    positional_codes(len(counted(tiny_shards)), 3).save("codes.safetensors")
    return tmp_path


def test_the_most_frequent_tokens_ties_by_id(tiny_shards, monkeypatch):
    counts = counted(tiny_shards)
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    assert len(set(counts.tolist())) < len(counts), "no ties: the test says less than it should"
    for block in (statistics.BLOCK_TOKENS, 64 * 3):  # in one piece, and in many
        monkeypatch.setattr(statistics, "BLOCK_TOKENS", block)
        for rows in (1, 40, len(counts)):
            ids, how = choose_tokens(DedicatedChoice(rows, tiny_shards), len(counts), None)
            assert ids.tolist() == sorted(order[:rows]) and how == f"{rows} most frequent of tiny"


def test_pairs_are_counted_where_there_are_no_languages(pair_shards):
    dataset = ShardDataset.open(pair_shards)
    dataset.languages = []
    ids = np.concatenate([dataset.rows("train", pair).ravel() for pair in dataset.pairs])
    counts = np.bincount(ids, minlength=dataset.manifest["tokenizer"]["vocab_size"])
    counts[dataset.manifest["tokenizer"]["special_ids"]] = 0
    assert counts.any() and np.array_equal(statistics.training_frequency(dataset), counts)


def test_a_list_has_comments_and_empty_lines(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# frequent\n7\n\n  3   # the\r\n99\n", encoding="utf-8")
    assert read_token_ids(path, 100, "--tokens").tolist() == [3, 7, 99]
    path.write_text("7\n3\n", encoding="utf-8-sig")
    assert read_token_ids(path, 100, "--tokens").tolist() == [3, 7]
    with pytest.raises(UserError, match="too many for a list"):
        read_token_ids(Path("/dev/zero"), 100, "--tokens")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\nthe\n", ":2: 'the' is not a token id"),
        ("-1\n", ":1: '-1' is not a token id"),
        ("1\n\n100\n", r":3: token 100 is not in 0\.\.99"),
        ("5\n7\n5\n", ":3: token 5 stands in line 1 already"),
        ("# nothing\n", "holds no token id"),
        ("٣\n", "is not a token id"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_list_is_told_with_its_line(content, message, tmp_path):
    path = tmp_path / "ids.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="^--tokens.*" + re.escape(path.name) + ".*" + message):
        read_token_ids(path, 100, "--tokens")


def test_by_loss_takes_where_the_summed_loss_is_greatest(tiny_shards, tmp_path):
    """Against dense logits in float64."""
    dataset, num_tokens = ShardDataset.open(tiny_shards), len(counted(tiny_shards))
    torch.manual_seed(0)
    config = KSubRobertaConfig.tiny(vocab_size=num_tokens, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model = KSubRobertaForMaskedLM(config, positional_codes(num_tokens, 3)).eval()
    with torch.no_grad():
        model.decoder_bias.normal_()
    expected = np.zeros(num_tokens)
    for _, batch in HeldOutBatches(dataset, 1000, 0.15):
        tensors = to_tensors(batch, "cpu")
        labels = tensors.pop("labels").flatten()
        with torch.no_grad():
            losses = F.cross_entropy(model(**tensors).logits.flatten(0, 1).double(), labels, reduction="none")
        np.add.at(expected, labels[labels >= 0].numpy(), losses[labels >= 0].numpy())
    model.save_pretrained(tmp_path / "model")
    np.testing.assert_allclose(summed_losses(tmp_path / "model", dataset), expected, rtol=1e-4)
    choice = DedicatedChoice(25, tiny_shards, by_loss=tmp_path / "model")
    ids, _ = choose_tokens(choice, num_tokens, None)
    assert set(ids.tolist()) == set(np.argsort(-expected)[:25].tolist())


def test_every_command_gives_the_same_tokens_rows(folder, tiny_shards, capsys):
    shards, tokenizer = str(tiny_shards), str(tiny_shards / "tokenizer")
    table = CodeTable.load("codes.safetensors")
    expected = np.sort(np.argsort(-counted(tiny_shards), kind="stable")[:30])
    rows = ["--dedicated-rows", "30"]
    commands = {
        "dedicate": ["codes.safetensors", "--rows", "30", "--data", shards],
        "positional": ["--tokenizer", tokenizer, "--num-tables", "3", *rows, "--data", shards],
        "cluster": ["--embeddings", shards, "--table-size", "8", "--no-align", "--workers", "1", *rows],
    }
    for name, options in commands.items():
        assert main(["codes", name, *options, "--out", f"{name}.safetensors"]) == 0
        assert "rows, 30 dedicated rows" in capsys.readouterr().out, name
        found = CodeTable.load(f"{name}.safetensors")
        assert found.dedicated.tolist() == expected.tolist(), name
        assert found.metadata["dedicated_by"] == "30 most frequent of tiny"
    assert (CodeTable.load("positional.safetensors").codes == table.codes).all()

    assert main(["codes", "inspect", "dedicate.safetensors", "--embedding-dim", "60"]) == 0
    shown = capsys.readouterr().out
    shared = table.num_parameters(60)
    assert re.search(
        rf"dedicated rows \(F\) +30 tokens, .* of all: 1,800 of the parameters \({1800 / (shared + 1800):.1%}\)", shown
    )
    assert f"{shared + 1800:,}, against" in shown
    assert main(["codes", "inspect", "codes.safetensors"]) == 0 and "dedicated" not in capsys.readouterr().out


def test_more_are_added_and_a_grown_vocabulary_keeps_them(folder, capsys):
    (folder / "ids.txt").write_text("5\n3\n")
    assert main(["codes", "dedicate", "codes.safetensors", "--tokens", "ids.txt", "--out", "two"]) == 0
    (folder / "ids.txt").write_text("9\n3\n")
    assert main(["codes", "dedicate", "two", "--tokens", "ids.txt", "--out", "three"]) == 0
    assert CodeTable.load("three").dedicated.tolist() == [3, 5, 9]
    table = CodeTable.load("three")
    new = table.num_tokens + 1
    (folder / "new.txt").write_text("Zürich\n水\n", encoding="utf-8")
    (folder / "ids.txt").write_text(f"{new}\n")
    extend = ["codes", "extend", "three", "--tokens", "new.txt", "--out"]
    assert main([*extend, "same"]) == 0 and CodeTable.load("same").dedicated.tolist() == [3, 5, 9]
    assert main([*extend, "more", "--dedicated-tokens", "ids.txt"]) == 0
    assert CodeTable.load("more").dedicated.tolist() == [3, 5, 9, new]
    capsys.readouterr()
    (folder / "ids.txt").write_text(f"{new + 1}\n")
    assert main([*extend, "none", "--dedicated-tokens", "ids.txt"]) == 2
    assert f"--dedicated-tokens: ids.txt:1: token {new + 1} is not in 0..{new}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give --rows F with --data SHARDS or --by-loss RUN, or --tokens FILE"),
        (["--rows", "3"], "--rows 3: give --data SHARDS too"),
        (["--rows", "0", "--data", "x"], "--rows 0: must be at least 1"),
        (["--rows", "9999", "--data", "SHARDS"], "--rows 9999: there are only"),
        (["--rows", "3", "--data", "absent"], "absent: is not a folder"),
        (["--rows", "3", "--tokens", "x"], "--tokens x: names the tokens; leave --rows"),
        (["--by-loss", "x"], "--by-loss x: give --rows F too"),
        (["--by-loss", "x", "--rows", "3"], "--by-loss x: is not a run; give --data SHARDS"),
        (["--by-loss", "x", "--rows", "3", "--data", "SHARDS"], "x"),
        (["--rows", "3", "--data", "SHARDS", "OTHER"], "made with another tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, tiny_shards, options, words, capsys):
    positional_codes(77, 2).save("other.safetensors")
    codes = "other.safetensors" if "OTHER" in options else "codes.safetensors"
    options = [str(tiny_shards) if each == "SHARDS" else each for each in options if each != "OTHER"]
    assert main(["codes", "dedicate", codes, "--out", "out", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("error: ") and not (folder / "out").exists()


def test_a_command_is_not_told_of_an_option_that_it_lacks(tmp_path):
    for options in ({"rows": 3}, {"rows": 3, "tokens": tmp_path}):
        with pytest.raises(UserError) as error:
            DedicatedChoice(**options)
        assert "by-loss" not in str(error.value)


def test_the_vectors_of_a_model_have_the_rows_added(tmp_path):
    table = with_dedicated(positional_codes(60, 3), np.array([2, 50]), "hand")
    model = KSubRobertaForMaskedLM(KSubRobertaConfig.tiny(vocab_size=60), table)
    layer = model.get_input_embeddings()
    with torch.no_grad():
        layer.dedicated_rows.normal_()
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(export_vectors(tmp_path), layer.dense_weight().detach().numpy(), rtol=1e-6)
