"""Distilling a compressed sentence encoder: it learns, goes on where it was killed, and keeps its best state."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from ksub_ds.cli import main
from ksub_ds.codes.product_quantisation import product_quantisation
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.convert.compress import compress_with_report
from ksub_ds.convert.fitting import Fit
from ksub_ds.convert.sentence_distillation import (
    GOOD,
    LR,
    TABLE_LR,
    DistillationProgress,
    SentenceDistillation,
    encode,
    read_texts,
    relative_loss,
)

library = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers 6 is not installed (pip install -e '.[interop]')"
)
WORDS = [
    "the",
    "a",
    "house",
    "dog",
    "water",
    "of",
    "sees",
    "runs",
    "and",
    "not",
    "is",
    "blue",
    "old",
    "new",
    "under",
    "over",
    "with",
]


def write_encoder(folder, tiny_bpe):
    """Write an encoder and its tokenizer; sentence-transformers takes the mean of its states."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bpe)
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=80,
    )
    model = RobertaModel(config, add_pooling_layer=False)
    model.embeddings.word_embeddings.weight.data *= 20  # so that words differ more than places
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts(count=200):
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, 5)) for _ in range(count)]


@pytest.fixture(scope="module")
def encoders(tiny_bpe: Path, tmp_path_factory: pytest.TempPathFactory):
    """A teacher, and a student of two tables of four rows."""
    folder = tmp_path_factory.mktemp("encoders") / "plain"
    write_encoder(folder, tiny_bpe)
    teacher = library.SentenceTransformer(str(folder), device="cpu")
    model = teacher[0].auto_model
    found = product_quantisation(model.get_input_embeddings().weight.detach().numpy(), 2, 4)
    small = compress_with_report(model, found.table, fits=[Fit(found.rows, None, 0.0)])[0]
    student = copy.deepcopy(teacher)
    student[0].auto_model.set_input_embeddings(small.get_input_embeddings())
    return teacher, student


def seconds():
    """A clock that counts its calls: a step takes one second."""
    return itertools.count().__next__


def weights(model):
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def test_the_student_comes_nearer_and_keeps_its_best_state(encoders):
    teacher, student = encoders[0], copy.deepcopy(encoders[1])
    before = weights(teacher).clone()
    training = SentenceDistillation(student, teacher, texts(), minutes=1, clock=seconds())
    progress = training.run()
    losses = [point["loss"] for point in progress.curve]
    assert progress.step == 60 and len(losses) == 21
    assert progress.best == min(losses) < 0.5 * losses[0]
    with torch.no_grad():
        held_out = relative_loss(encode(student, training.held_out), encode(teacher, training.held_out))
    assert float(held_out) == pytest.approx(progress.best, rel=1e-4)
    assert torch.equal(weights(teacher), before)
    assert len(training.held_out) == 20 and not set(training.held_out) & set(training.texts) - set(texts())


def test_a_killed_distillation_goes_on_as_if_it_had_not_been(encoders, tmp_path, monkeypatch):
    teacher, whole = encoders[0], copy.deepcopy(encoders[1])
    SentenceDistillation(whole, teacher, texts(), minutes=1, clock=seconds()).run()
    step = SentenceDistillation._step

    def killed(self):
        if self.progress.step == 31:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(SentenceDistillation, "_step", killed)
    student = copy.deepcopy(encoders[1])
    with pytest.raises(KeyboardInterrupt):
        SentenceDistillation(student, teacher, texts(), minutes=1, clock=seconds()).run(tmp_path / "state")
    monkeypatch.setattr(SentenceDistillation, "_step", step)
    again = copy.deepcopy(encoders[1])
    training = SentenceDistillation(again, teacher, texts(), minutes=1, clock=seconds())
    progress = training.run(tmp_path / "state")
    assert progress.step == 60 and len(progress.curve) == 21
    torch.testing.assert_close(weights(again), weights(whole))


def test_it_ends_when_nothing_is_gained(encoders):
    """The teacher's own copy cannot come nearer."""
    teacher = encoders[0]
    progress = SentenceDistillation(copy.deepcopy(teacher), teacher, texts(), minutes=1, clock=seconds()).run()
    assert len(progress.curve) == 7 and progress.step < 60 and progress.best < 1e-6


def test_few_texts_are_refused_before_the_long_work(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*texts(19), "", texts(1)[0]]))
    with pytest.raises(UserError, match=rf"--distill {path}: holds 19 texts; give at least 20"):
        read_texts(path)
    path.write_text("\n".join(texts(20)))
    assert read_texts(path) == texts(20)


def test_a_good_student_is_taught_gently_and_not_given_up_for_its_first_steps(encoders):
    """As all-MiniLM at 1/16: full steps led away from the start for half of the time."""
    losses = [0.041, 0.046, 0.051, 0.0495, 0.0478, 0.0471]
    progress = DistillationProgress(curve=[{"loss": loss} for loss in losses])
    assert progress.since_best == 4 and progress.rate == pytest.approx((0.041 / GOOD) ** 0.5)
    assert DistillationProgress(curve=[{"loss": 0.9}, {"loss": 0.8}]).rate == 1
    teacher, student = encoders[0], copy.deepcopy(encoders[1])
    training = SentenceDistillation(student, teacher, texts(), minutes=1, clock=seconds())
    training.progress.curve.append({"loss": GOOD / 4})
    training.progress.seconds = 60 * 0.5
    training._step()
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx(
        [TABLE_LR * 0.5 * 0.5 / 0.95, LR * 0.5 * 0.5 / 0.95]
    )


def test_compress_and_distil_in_one_command(tiny_bpe: Path, tmp_path: Path, capsys):
    write_encoder(tmp_path / "plain", tiny_bpe)
    (tmp_path / "text.txt").write_text("\n".join(texts()))
    command = ["compress", str(tmp_path / "plain"), "--input-only", "--num-tables", "2", "--table-size", "4"]
    command += ["--distill", str(tmp_path / "text.txt"), "--minutes", "0.02", "--out", str(tmp_path / "small")]
    assert main(command) == 0
    report = read_json(tmp_path / "small" / "compression.json")["distillation"]
    assert report["texts"] == 200 and report["curve"][0]["step"] == 0
    small, plain = (library.SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("small", "plain"))
    with torch.no_grad():
        loss = float(relative_loss(encode(small, texts()), encode(plain, texts())))
    assert loss < report["curve"][0]["loss"] * 1.2 and np.isfinite(loss)
    assert not (tmp_path / "small.distillation").exists()
    assert "of their square is lost, after" in capsys.readouterr().err
    assert main([*command[:-4], "--minutes", "0", "--out", str(tmp_path / "other")]) == 2
    assert "--minutes 0.0: must be greater than 0" in capsys.readouterr().err


def test_what_lies_where_snapshots_would_be_is_kept_and_damaged_ones_are_named(tiny_bpe, tmp_path, capsys):
    write_encoder(tmp_path / "plain", tiny_bpe)
    (tmp_path / "text.txt").write_text("\n".join(texts()))
    command = ["compress", str(tmp_path / "plain"), "--input-only", "--num-tables", "2", "--table-size", "4"]
    command += ["--distill", str(tmp_path / "text.txt"), "--minutes", "0.02", "--out", str(tmp_path / "small")]
    state = tmp_path / "small.distillation"
    state.mkdir()
    (state / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert f"{state}: would be replaced by the snapshots of --distill" in capsys.readouterr().err
    assert (state / "notes.txt").read_text() == "mine"
    (state / "progress.json").write_text('{"step": 1, "other": 2}')
    assert main(command) == 2
    assert f"{state}: holds damaged snapshots; remove the folder" in capsys.readouterr().err


def test_vectors_are_learnt_with_the_default_prompt(encoders):
    teacher = copy.deepcopy(encoders[0])
    teacher.prompts, teacher.default_prompt_name = {"query": "the house sees "}, "query"
    expected = teacher.encode(texts(3), convert_to_tensor=True)
    torch.testing.assert_close(encode(teacher, texts(3)).detach(), expected)
    assert not torch.allclose(encode(encoders[0], texts(3)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_reported_is_what_the_folder_holds(dtype: torch.dtype, tiny_bpe: Path, tmp_path: Path, monkeypatch):
    """With a dense layer behind the encoder, and in half precision."""
    from sentence_transformers.sentence_transformer.modules import Dense

    write_encoder(tmp_path / "encoder", tiny_bpe)
    encoder = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    encoder[0].auto_model.to(dtype)
    torch.manual_seed(2)
    library.SentenceTransformer(modules=[encoder[0], encoder[1], Dense(24, 6)]).save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_text("\n".join(texts()))
    clock = seconds()
    init = SentenceDistillation.__init__
    monkeypatch.setattr(SentenceDistillation, "__init__", lambda *given: init(*given, clock=clock))
    command = ["compress", str(tmp_path / "plain"), "--input-only", "--num-tables", "2", "--table-size", "4"]
    command += ["--distill", str(tmp_path / "text.txt"), "--minutes", "1", "--out", str(tmp_path / "small")]
    assert main(command) == 0
    report = read_json(tmp_path / "small" / "compression.json")["distillation"]
    assert report["steps"] == 60 and report["loss"] < 0.8 * report["curve"][0]["loss"]
    small, plain = (library.SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("small", "plain"))
    assert small[0].auto_model.dtype == dtype
    training = SentenceDistillation(small.float(), plain.float(), texts(), 1)
    with torch.no_grad():
        loss = float(relative_loss(encode(small, training.held_out), encode(plain, training.held_out)))
    assert loss == pytest.approx(report["loss"], rel=1e-4 if dtype == torch.float32 else 0.02)
