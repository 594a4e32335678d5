"""Rows of their own to a target of bytes or error, for models that predict tokens: by brute force and by command."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

import ksub_ds  # noqa: F401 - registers the classes
from ksub_ds.cli import main
from ksub_ds.convert.compress import compress_with_report
from ksub_ds.convert.fitting import fit_all, fit_tables
from ksub_ds.convert.target_rows import dedicate_to_error, dedicate_to_ratio
from ksub_ds.vectors.dedicated import with_dedicated
from tests.convert.test_compress import bert, composed, random_codes, relative_error, words

COUNT, WIDTH = 200, 24


def approximation(vectors, table, fit):
    """What the model reads: the tables' rows, and the old ones of dedicated tokens."""
    found = composed(fit, table)
    found[table.dedicated] = vectors[table.dedicated]
    return found


def weights_of(weighted, count=COUNT):
    return np.random.default_rng(1).integers(1, 50, count).astype(float) if weighted else None


def untied(own, decoder):
    """A causal model with these two matrices."""
    config = LlamaConfig(
        vocab_size=COUNT, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(own))
        model.get_output_embeddings().weight.copy_(torch.from_numpy(decoder))
    return model


@settings(max_examples=15, deadline=None)
@given(st.floats(1.05, 3.0), st.sampled_from(["none", "orthogonal", "linear"]), st.booleans(), st.integers(0, 99))
def test_as_many_rows_as_the_bytes_allow_and_the_right_ones(ratio, mixing, weighted, seed):
    vectors, codes, weights = words(seed=seed), random_codes(COUNT, (8, 6, 6), seed), weights_of(weighted)
    budget = COUNT * WIDTH * 4 / ratio
    table, fits = dedicate_to_ratio(codes, [vectors], ratio, 4, mixing, weights)
    stored = table.stored_bytes(WIDTH, 4, 0 if fits[0].mixing is None else WIDTH * WIDTH)
    assert stored <= budget < stored + 4 * WIDTH + 4
    before = fit_tables(vectors, codes, mixing, weights)
    counted = np.ones(COUNT) if weights is None else weights
    lost = counted * np.square(vectors - composed(before, codes)).sum(1)
    others = np.setdiff1d(np.arange(COUNT), table.dedicated)
    assert lost[table.dedicated].min() >= lost[others].max() * (1 - 1e-5)
    assert relative_error(vectors, approximation(vectors, table, fits[0]), counted) < before.error


@settings(max_examples=15, deadline=None)
@given(st.floats(0.25, 0.6), st.sampled_from(["none", "linear"]), st.booleans(), st.integers(0, 99))
def test_no_more_is_lost_than_allowed_and_little_less(target, mixing, weighted, seed):
    vectors, codes, weights = words(400, seed=seed), random_codes(400, (8, 6, 10), seed), weights_of(weighted, 400)
    counted = np.ones(400) if weights is None else weights
    table, fits = dedicate_to_error(codes, [vectors], target, 4, mixing, weights)
    assert relative_error(vectors, approximation(vectors, table, fits[0]), counted) <= target * (1 + 1e-5)
    if table.num_dedicated:
        before = fit_tables(vectors, codes, mixing, weights)
        worst = np.argsort(-counted * np.square(vectors - composed(before, codes)).sum(1), kind="stable")
        kept = worst[: int(table.num_dedicated * 0.97) - 1]
        fewer = with_dedicated(codes, kept, "")
        fit = fit_tables(vectors, fewer, mixing, np.where(np.isin(np.arange(400), kept), 0, counted))
        assert relative_error(vectors, approximation(vectors, fewer, fit), counted) > target * (1 - 1e-5)


@pytest.mark.parametrize("equal", ["input", "decoder", "both"])
def test_a_matrix_that_needs_no_mixing_beside_one_that_does(equal):
    """Rows that are all alike are exact without A, and the layer has one for both matrices or for none."""
    pair = {"input": words(seed=1), "decoder": words(seed=2)}
    for name, vectors in pair.items():
        if equal in (name, "both"):
            vectors[:] = vectors[0]
    codes = random_codes(COUNT, (8, 6, 6), 0)
    model = untied(*pair.values())
    for fits in (None, dedicate_to_ratio(codes, list(pair.values()), 2, 4)):
        table, fits = (codes, None) if fits is None else fits
        small, _ = compress_with_report(model, table, "linear", fits=fits)
        found = fits or fit_all(list(pair.values()), codes, "linear")
        for layer, vectors, fit in zip(
            (small.get_input_embeddings(), small.decoder_embedding()), pair.values(), found, strict=True
        ):
            expected = approximation(vectors, table, fit)
            np.testing.assert_allclose(layer.dense_weight().detach().numpy(), expected, atol=1e-4)


def test_two_matrices_share_the_target():
    own, decoder = words(seed=1), words(seed=2)
    codes = random_codes(COUNT, (8, 6, 6), 0)
    table, fits = dedicate_to_error(codes, [own, decoder], 0.2, 4, "none")
    ones = np.ones(COUNT)
    pairs = zip((own, decoder), fits, strict=True)
    errors = [relative_error(each, approximation(each, table, fit), ones) for each, fit in pairs]
    assert np.mean(errors) <= 0.2 and 0 < table.num_dedicated < COUNT
    model = untied(own, decoder)
    report = compress_with_report(model, table, "none", fits=fits)[1]
    assert report.error == pytest.approx(np.mean(errors), rel=1e-3) and report.num_dedicated == table.num_dedicated


@pytest.mark.parametrize("wish", [["--target-ratio", "2"], ["--target-error", "0.1"]])
def test_a_masked_model_by_the_command(tmp_path, wish):
    plain = bert(words())
    plain.save_pretrained(tmp_path / "plain")
    small, dense = str(tmp_path / "small"), str(tmp_path / "dense")
    sizes = ["--num-tables", "2", "--table-size", "20", "--mixing", "none"]
    assert main(["compress", str(tmp_path / "plain"), "--out", small, *sizes, *wish]) == 0
    report = json.loads((tmp_path / "small" / "compression.json").read_text())
    before, after = report["embedding_bytes"]
    assert report["num_dedicated"] > 0
    assert before / after >= 2 if wish[0] == "--target-ratio" else report["error"] <= 0.1
    assert main(["export", small, "--dense", "--out", dense]) == 0
    ids = torch.arange(COUNT).view(10, 20)
    with torch.no_grad():
        logits = [AutoModelForMaskedLM.from_pretrained(each).eval()(ids).logits for each in (small, dense)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_a_causal_model_of_two_matrices_by_the_command(tmp_path):
    untied(words(seed=1), words(seed=2)).save_pretrained(tmp_path / "plain")
    options = ["--num-tables", "2", "--table-size", "20", "--mixing", "none", "--target-ratio", "1.5"]
    assert main(["compress", str(tmp_path / "plain"), "--out", str(tmp_path / "small"), *options]) == 0
    report = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert 1.5 <= report["embedding_bytes"][0] / report["embedding_bytes"][1] < 1.6
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_targets_that_cannot_be_met_are_one_line(tmp_path, capsys):
    bert(words()).save_pretrained(tmp_path / "plain")
    line = ["compress", str(tmp_path / "plain"), "--out", str(tmp_path / "small"), "--table-size", "20"]
    for options, message in (
        (["--target-ratio", "20"], "take 1/"),
        (["--target-error", "1e-6"], "and no bytes be saved"),
    ):
        assert main([*line, "--num-tables", "2", *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
