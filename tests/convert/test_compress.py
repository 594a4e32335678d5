"""Fitting tables to a matrix, and compressing models: against brute force, against random codes, for every family."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ksub_ds import CodeTable, clustered_codes, compress, plain_codes, positional_codes, replace_embeddings
from ksub_ds.cli import main
from ksub_ds.common.errors import UserError
from ksub_ds.convert.compress import compress_with_report
from ksub_ds.convert.fitting import fit_tables
from ksub_ds.model.loading import open_model
from ksub_ds.model.replacement import embedding_matrix

SIZE = {"vocab_size": 200, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def words(count=200, width=24, seed=0):
    """Vectors with groups and sub-groups, as words have them."""
    draw = np.random.default_rng(seed)
    coarse, fine = draw.standard_normal((6, width)), draw.standard_normal((12, width))
    parts = coarse[draw.integers(6, size=count)] + 0.5 * fine[draw.integers(12, size=count)]
    return (parts + 0.2 * draw.standard_normal((count, width)) + 1).astype(np.float32)


def composed(fit, table):
    rows = np.concatenate([part[table.codes[:, k]] for k, part in enumerate(fit.tables)], axis=1)
    return rows if fit.mixing is None else rows @ fit.mixing.T


def relative_error(vectors, approximation, weights):
    mean = weights @ vectors / weights.sum()
    return (weights @ np.square(vectors - approximation).sum(1)) / (weights @ np.square(vectors - mean).sum(1))


def random_codes(count, sizes, seed):
    draw = np.random.default_rng(seed)
    numbers = draw.choice(int(np.prod(sizes)), size=count, replace=False)
    return CodeTable(np.stack(np.unravel_index(numbers, sizes), axis=1), sizes)


def bert(vectors=None, head=AutoModelForMaskedLM, family="bert", **more):
    torch.manual_seed(0)
    model = head.from_config(AutoConfig.for_model(family, **SIZE | more)).eval()
    if vectors is not None:
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(torch.from_numpy(vectors))
    return model


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.sampled_from([2, 7, 12]), st.booleans(), st.integers(0, 2**31))
def test_each_freedom_helps_and_the_error_is_the_real_one(num_tables, width, weighted, seed):
    draw = np.random.default_rng(seed)
    vectors = words(60, max(width, num_tables), seed)
    weights = draw.integers(0, 5, size=60) + 0.1 if weighted else np.ones(60)
    table = random_codes(60, (5, 4, 6, 3)[:num_tables] if num_tables > 2 else (9, 8), seed)
    fits = [fit_tables(vectors, table, mixing, weights) for mixing in ("none", "orthogonal", "linear")]
    for fit in fits:
        assert fit.error == pytest.approx(relative_error(vectors, composed(fit, table), weights), rel=1e-3, abs=1e-5)
    none, orthogonal, linear = (fit.error for fit in fits)
    assert none + 1e-9 >= orthogonal and orthogonal + 1e-9 >= linear
    if fits[1].mixing is not None:
        matrix = fits[1].mixing
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-4)


def test_rows_are_the_means_of_what_shares_them():
    vectors, table = words(50, 7), random_codes(50, (4, 5, 3), 0)
    fit = fit_tables(vectors, table, "none")
    assert [part.shape for part in fit.tables] == [(4, 3), (5, 2), (3, 2)] and fit.mixing is None
    row = vectors[table.codes[:, 1] == 2][:, 3:5].mean(axis=0)
    np.testing.assert_allclose(fit.tables[1][2], row, rtol=1e-5)
    for k, part in enumerate(fit.tables):  # a step away in any row is worse: it is the least-squares solution
        moved = [each.copy() for each in fit.tables]
        moved[k] += 0.01 * np.sign(part)
        rows = np.concatenate([each[table.codes[:, j]] for j, each in enumerate(moved)], axis=1)
        assert relative_error(vectors, rows, np.ones(50)) > fit.error


def test_wide_tables_reach_the_full_width_optimum():
    """M_k <= d_k: the linear form is any sum of full-width tables, whose optimum least squares gives directly."""
    vectors, table = words(), random_codes(200, (8, 8, 8), 1)
    ones = np.concatenate([np.eye(8)[column] for column in table.codes.T], axis=1)
    best = ones @ np.linalg.lstsq(ones, vectors, rcond=None)[0]
    fit = fit_tables(vectors, table, "linear")
    assert fit.error == pytest.approx(relative_error(vectors, best, np.ones(200)), rel=1e-4)


def test_plain_codes_lose_nothing():
    vectors = words()
    fit = fit_tables(vectors, plain_codes(200))
    assert fit.error < 1e-12 and fit.mixing is None
    np.testing.assert_array_equal(fit.tables[0], vectors)


@pytest.mark.parametrize("mixing", ["none", "orthogonal", "linear"])
def test_clustered_codes_never_lose_to_random_ones(mixing):
    vectors = words()
    model = bert(vectors)
    table = clustered_codes(vectors, num_tables=3, table_size=6)
    small, report = compress_with_report(model, table, mixing)
    ours = embedding_matrix(small).numpy()
    assert report.error == pytest.approx(relative_error(vectors, ours, np.ones(200)), rel=1e-3)
    for seed in range(5):
        other = compress_with_report(model, random_codes(200, (6, 6, 6), seed), mixing)[1]
        assert report.error < other.error and report.cosine > other.cosine
    fresh = embedding_matrix(replace_embeddings(model, table)).numpy()
    assert report.error < relative_error(vectors, fresh, np.ones(200))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_a_compressed_model_is_saved_and_read(family, tmp_path):
    more = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    model = bert(words(), family=family, **(more if family == "modernbert" else {}))
    model.save_pretrained(tmp_path / "plain")
    table = clustered_codes(words(), num_tables=2, table_size=20)
    small = compress(tmp_path / "plain", table)
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "small").eval()
    ids = torch.randint(3, 200, (2, 9))
    assert torch.equal(again(ids, labels=ids).loss, small(ids, labels=ids).loss)
    model.get_input_embeddings().weight.data = embedding_matrix(small)
    model.tie_weights()
    torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixing", ["none", "linear"])
def test_dedicated_tokens_keep_their_embedding_whatever_the_codes(mixing):
    """From K tables to other ones with rows of their own: the tables serve the other tokens alone."""
    old = compress(bert(words()), clustered_codes(words(), num_tables=3, table_size=6))
    vectors = embedding_matrix(old).numpy()
    own = np.array([0, 3, 64, 199])
    other = random_codes(200, (9, 30), 1)
    new, report = compress_with_report(old, CodeTable(other.codes, other.table_sizes, None, own), mixing)
    ours = embedding_matrix(new).numpy()
    np.testing.assert_allclose(ours[own], vectors[own], rtol=1e-5, atol=1e-6)
    rest = np.ones(200)
    rest[own] = 0
    assert relative_error(vectors, ours, rest) == pytest.approx(fit_tables(vectors, other, mixing, rest).error, 1e-3)
    assert relative_error(vectors, ours, rest) < relative_error(
        vectors, embedding_matrix(compress(old, other, mixing)).numpy(), rest
    )
    assert report.error == pytest.approx(relative_error(vectors, ours, np.ones(200)), 1e-3)
    assert report.embedding_parameters[1] == (9 + 30) * 12 + 4 * 24


def test_a_model_whose_tokens_are_all_dedicated_is_the_old_one():
    model, table = bert(words()), random_codes(200, (9, 30), 1)
    new = compress(model, CodeTable(table.codes, table.table_sizes, None, np.arange(200)))
    ids = torch.randint(3, 200, (2, 9))
    torch.testing.assert_close(new(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_report_counts_and_calls_back():
    model = bert(words(), head=AutoModel)
    table = positional_codes(200, 3)
    small, report = compress_with_report(model, table, loss=lambda each: float(each.num_parameters()))
    assert report.embedding_parameters == (200 * 24, 6 * 24) and report.mixing_numbers == 24 * 24
    assert report.total_parameters == (model.num_parameters(), small.num_parameters()) == report.loss
    assert json.loads(json.dumps(report.to_json()))["num_tokens"] == 200
    assert "4,800 -> 144 and 576 fixed numbers (the linear matrix)" in report.lines()[0]


def test_the_error_of_gemma_is_that_of_its_vectors_unscaled():
    """Its own lookup multiplies by the root of the width; the matrix that was fitted is not so."""
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields |= {"head_dim": 8, "intermediate_size": 48, "vocab_size": 200, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **fields))
    small, report = compress_with_report(model, positional_codes(200, 3))
    old, new = embedding_matrix(model), small.get_input_embeddings().dense_weight().detach()
    wanted = (old - new).square().sum() / (old - old.mean(dim=0)).square().sum()
    assert report.error == pytest.approx(wanted.item(), rel=1e-4) and report.error < 1
    cosine = torch.cosine_similarity(old, new, dim=1).mean().item()
    assert report.cosine == pytest.approx(cosine, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_dedicated_tokens_keep_their_embedding_exactly(family):
    """The tables are fitted to the others, whose error falls; and what they lose is what is lost in all."""
    more = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    model = bert(words(), family=family, **(more if family == "modernbert" else {}))
    shared = positional_codes(200, 3)
    before = compress_with_report(model, shared)[1]
    table = CodeTable(shared.codes, shared.table_sizes, dedicated=np.arange(0, 200, 3))
    small, report = compress_with_report(model, table)
    vectors, ours = words(), embedding_matrix(small).numpy()
    np.testing.assert_allclose(ours[::3], vectors[::3], atol=1e-6)
    assert report.error == pytest.approx(relative_error(vectors, ours, np.ones(200)), rel=1e-3)
    assert report.error < before.error
    others = np.arange(200) % 3 > 0
    lost = np.square(vectors - ours)[others].sum()
    assert lost < np.square(vectors - embedding_matrix(compress(model, shared)).numpy())[others].sum()
    assert report.num_dedicated == 67 and "67 dedicated rows among them" in report.lines()[0]
    assert report.embedding_parameters[1] == 3 * 6 * 8 + 67 * 24
    ids = torch.randint(3, 200, (2, 9))
    everything = CodeTable(shared.codes, shared.table_sizes, dedicated=range(200))
    same = compress(model, everything)
    torch.testing.assert_close(same(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_rows_that_no_token_uses_differ():
    table = CodeTable(np.stack([np.arange(200) % 15, np.arange(200) // 15], 1), (20, 20))
    layer = compress(bert(words()), table, mixing="none").get_input_embeddings()
    assert len(torch.unique(layer.tables[0], dim=0)) == 20
    spread = (layer.tables[0][15:] - layer.tables[0][:15].mean(dim=0)).abs().max()
    assert spread < 0.2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused(value):
    vectors = words()
    vectors[7, 3] = value
    with pytest.raises(ValueError, match="the embedding has a number that is NaN or infinite"):
        fit_tables(vectors, positional_codes(200, 3), "none")


def test_an_unknown_mixing_is_refused():
    with pytest.raises(ValueError, match="mixing 'rotation': must be one of linear, orthogonal, none"):
        fit_tables(words(), positional_codes(200, 3), "rotation")


def test_what_cannot_be_compressed_is_refused(tmp_path):
    untied = bert(tie_word_embeddings=False)
    with pytest.raises(ValueError, match="decoder is not tied"):
        compress(untied, positional_codes(200, 3))
    with pytest.raises(ValueError, match="weights"):
        compress(bert(), positional_codes(200, 3), weights=np.zeros(200))
    for name in ("not-there", str(tmp_path / "not-there")):
        with pytest.raises(UserError, match=f"^{name}: is neither a folder nor a model in the hub's cache, and"):
            open_model(name)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers finds no model it knows there"):
        open_model(tmp_path)
    bert().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        open_model(tmp_path)
    bert().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "aside")
    torch.save(bert().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights must be safetensors: pickled ones are not read"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "aside").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or damaged .*; get it anew"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"model\.safetensors: is a Git LFS pointer"):
        open_model(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors: is a file; give the folder"):
        open_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100}, "word_embeddings.weight is 200 x 24 in its weights and 100 x 24 by its config.json"),
        ({"num_hidden_layers": -1}, "num_hidden_layers of its config.json is -1; must be at least 1"),
        ({"hidden_size": 0}, "hidden_size of its config.json is 0; must be at least 1"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_named(fields, message, tmp_path):
    bert().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)


def test_a_damaged_weight_and_the_source_as_output_are_refused(tmp_path, capsys):
    model = bert()
    model.get_parameter("bert.encoder.layer.0.output.dense.weight").data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "above" / "damaged")
    folder = str(tmp_path / "above" / "damaged")
    command = ["compress", folder, "--num-tables", "2", "--table-size", "20", "--out"]
    assert main([*command, str(tmp_path / "small")]) == 2
    assert "encoder.layer.0.output.dense.weight has a number that is NaN or infinite" in capsys.readouterr().err
    for out in (folder, str(tmp_path / "above")):
        assert main([*command, out]) == 2
        assert f"--out {out}: is or holds {folder}, which is read" in capsys.readouterr().err
    inside = Path(folder) / "config.json" / "small"
    assert main([*command, str(inside)]) == 2
    assert "config.json is not a folder that can be written to" in capsys.readouterr().err


def test_ids_without_a_code_are_dropped_and_that_is_said(capsys):
    small = compress(bert(), positional_codes(150, 2))
    assert small.config.vocab_size == 150
    assert "50 ids of the model have no code, and are dropped" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "electra", "xlm-roberta"])
def test_a_folder_without_a_tokenizer_keeps_all_its_tokens(family, tmp_path):
    """transformers opens an empty tokenizer there, of special tokens alone."""
    bert(words(), family=family, **({"embedding_size": 24} if family == "electra" else {})).save_pretrained(tmp_path)
    command = ["compress", str(tmp_path), "--num-tables", "2", "--table-size", "20", "--out", str(tmp_path / "small")]
    assert main(command) == 0
    assert open_model(tmp_path / "small").config.vocab_size == 200
    assert not (tmp_path / "small" / "tokenizer_config.json").exists()
