"""transformers' own Trainer with our models: accumulated batches, metrics, and resuming, each with the real thing."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from ksub_ds import CodeTable, positional_codes, replace_embeddings

pytest.importorskip("accelerate", reason="the Trainer needs accelerate (pip install -e '.[test]')")

SIZE = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "bert": SIZE | NO_DROPOUT,
    "roberta": SIZE | NO_DROPOUT | {"max_position_embeddings": 40},
    "electra": SIZE | NO_DROPOUT | {"embedding_size": 12, "summary_last_dropout": 0.0},
    "distilbert": {"vocab_size": 120, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": SIZE
    | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
}
TABLE = CodeTable(np.random.default_rng(0).permutation(positional_codes(120, 3).codes), [5, 5, 5])
Rows = list[dict[str, Any]]


def model_of(family: str, head: Any = AutoModelForMaskedLM, **more: Any) -> Any:
    torch.manual_seed(0)
    return replace_embeddings(head.from_config(AutoConfig.for_model(family, **FAMILIES[family] | more)), TABLE)


def masked_rows(counts: tuple[int, ...], length: int = 8) -> Rows:
    """Rows with so many masked tokens each."""
    draw = np.random.default_rng(1)
    rows = []
    for count in counts:
        ids, labels = draw.integers(5, 120, length), np.full(length, -100)
        chosen = draw.permutation(length)[:count]
        labels[chosen] = ids[chosen]
        ids[chosen] = 4
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return rows


def trainer(model: Any, rows: Rows, folder: Path, batch: int = 4, accumulation: int = 1, **more: Any) -> Trainer:
    extra = {name: more.pop(name) for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in more}
    settings = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0} | more
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no"} | settings,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **extra)  # type: ignore[arg-type]


def assert_same_step_however_it_is_cut(model: Any, rows: Rows, folder: Path) -> None:
    """Train one step of four rows in batches of 4, 2 and 1, and compare losses and weights."""
    found = []
    for batch in (4, 2, 1):
        run = trainer(copy.deepcopy(model), rows, folder, batch, 4 // batch)
        run.train()
        weights = torch.cat([each.detach().flatten() for each in run.model.parameters()])  # type: ignore[union-attr]
        found.append((run.state.log_history[0]["loss"], weights))
    before = torch.cat([each.detach().flatten() for each in model.parameters()])
    assert not torch.equal(found[0][1], before)
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(weights - before, found[0][1] - before, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_accumulated_batches_are_one_batch(family: str, tmp_path: Path) -> None:
    """Rows of 1, 5, 0 and 3 masked tokens: a mean of the batches' means would weigh the tokens unequally."""
    assert_same_step_however_it_is_cut(model_of(family), masked_rows((1, 5, 0, 3)), tmp_path)


def test_accumulated_batches_of_a_classifier_are_one_batch(tmp_path: Path) -> None:
    model = model_of("roberta", AutoModelForSequenceClassification, num_labels=3)
    assert_same_step_however_it_is_cut(model, classified_rows(), tmp_path)


def classified_rows() -> Rows:
    rows = masked_rows((0, 0, 0, 0))
    for row, label in zip(rows, (2, 0, -100, 1), strict=True):  # a row whose class is not known
        row["labels"] = torch.tensor(label)
    return rows


def chosen_rows() -> Rows:
    """Two texts a row, of which one is right."""
    rows = classified_rows()
    for row in rows:
        row["input_ids"] = torch.stack([row["input_ids"], row["input_ids"].flip(0)])
        row["labels"] = row["labels"].clamp(max=1)
    return rows


def tagged_rows() -> Rows:
    """A class for some of the tokens."""
    rows = masked_rows((1, 5, 0, 3))
    for row in rows:
        row["labels"] = torch.where(row["labels"] == -100, -100, row["labels"] % 3)
    return rows


HEADS: dict[Any, Any] = {
    AutoModelForMaskedLM: lambda: masked_rows((1, 5, 0, 3)),
    AutoModelForSequenceClassification: classified_rows,
    AutoModelForTokenClassification: tagged_rows,
    AutoModelForMultipleChoice: chosen_rows,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_all_heads_add_up(family: str, head: Any) -> None:
    rows = HEADS[head]()
    several = head in (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    model = model_of(family, head, **({"num_labels": 3} if several else {}))
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    count = (batch["labels"] != -100).sum()
    model(**batch).loss.backward()
    wanted = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    parts = [model(**{k: v[i : i + 1] for k, v in batch.items()}, num_items_in_batch=count).loss for i in range(4)]
    sum(parts).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(sum(parts), model(**batch).loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("labels", [[[0.5], [1.0], [-2.0], [0.1]], [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
def test_accumulated_batches_of_other_classification_losses(labels: list[list[float]], tmp_path: Path) -> None:
    """Regression, and several classes at once."""
    rows = masked_rows((0, 0, 0, 0))
    for row, label in zip(rows, labels, strict=True):
        row["labels"] = torch.tensor(label)
    model = model_of("bert", AutoModelForSequenceClassification, num_labels=len(labels[0]))
    assert_same_step_however_it_is_cut(model, rows, tmp_path)


def test_a_step_without_labels_changes_nothing(tmp_path: Path) -> None:
    model = model_of("bert")
    before = [each.detach().clone() for each in model.parameters()]
    run = trainer(model, masked_rows((0,)), tmp_path, batch=1)
    run.train()
    assert run.state.log_history[0]["loss"] == 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def accuracy(predicted: Any) -> dict[str, float]:
    """compute_metrics as the documentation gives it."""
    labelled = predicted.label_ids != -100
    return {"accuracy": float((predicted.predictions[labelled] == predicted.label_ids[labelled]).mean())}


def rows_half_right(model: Any) -> tuple[Rows, torch.Tensor]:
    """Rows whose first label is what the model predicts, and the model's predictions everywhere."""
    rows = masked_rows((2, 5, 1, 3, 4))
    with torch.no_grad():
        best = model.eval()(torch.stack([row["input_ids"] for row in rows])).logits.argmax(dim=-1)
    for row, each in zip(rows, best, strict=True):
        place = int((row["labels"] != -100).nonzero()[0])
        row["labels"][place] = each[place]
    return rows, best


def test_metrics_get_predictions_of_the_labelled_positions(tmp_path: Path) -> None:
    model = model_of("bert")
    rows, best = rows_half_right(model)
    labels = torch.stack([row["labels"] for row in rows])
    run = trainer(model, rows, tmp_path, batch=2, compute_metrics=accuracy)
    found = run.predict(rows)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.predictions, torch.where(labels == -100, -100, best).numpy())
    right = float((best == labels)[labels != -100].float().mean())
    assert right > 0.3 and found.metrics is not None and found.metrics["test_accuracy"] == pytest.approx(right)
    assert run.evaluate()["eval_accuracy"] == pytest.approx(right)


def test_metrics_get_logits_on_request(tmp_path: Path) -> None:
    """As run_mlm.py of transformers uses them: reduced batch by batch."""
    model = model_of("roberta")
    rows, _ = rows_half_right(model)
    seen = []

    def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(logits.shape))
        return logits.argmax(dim=-1)

    wanted = trainer(model, rows, tmp_path, batch=2, compute_metrics=accuracy).evaluate()
    model.evaluation_output = "logits"
    found = trainer(
        model, rows, tmp_path, batch=2, compute_metrics=accuracy, preprocess_logits_for_metrics=best
    ).evaluate()
    assert found["eval_accuracy"] == wanted["eval_accuracy"] > 0.3
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"])
    assert seen[0] == (2, 8, 120)


def test_a_training_step_predicts_nothing() -> None:
    model = model_of("bert")
    batch = {name: torch.stack([row[name] for row in masked_rows((2, 3))]) for name in ("input_ids", "labels")}
    assert set(model.train()(**batch, num_items_in_batch=5)) == {"loss"}
    assert set(model.eval()(**batch)) == {"loss"}
    assert set(model(**batch, num_items_in_batch=5)) == {"loss", "predictions"}
    model.evaluation_output = "loss"
    assert set(model(**batch, num_items_in_batch=5)) == {"loss"}


def test_the_trainer_keeps_the_columns_that_the_encoder_reads(tmp_path: Path) -> None:
    """Columns that `forward` does not name are dropped from a data set without a word."""
    datasets = pytest.importorskip("datasets")
    model, rows = model_of("bert"), masked_rows((2, 5, 1, 3))
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_()
    for row in rows:
        row["token_type_ids"] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    stored = datasets.Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])
    expected = trainer(model, rows, tmp_path).evaluate()["eval_loss"]
    assert trainer(model, stored, tmp_path).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    for row in rows:
        del row["token_type_ids"]
    assert trainer(model, rows, tmp_path).evaluate()["eval_loss"] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_resuming_is_silent_and_the_same(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = masked_rows((1, 2, 3, 4, 5, 1, 2, 3))
    settings: dict[str, Any] = {"batch": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = trainer(model_of(family), rows, tmp_path, **settings)
    whole.train()
    logging.getLogger("transformers").propagate = True
    try:
        resumed = trainer(model_of(family), rows, tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    finally:
        logging.getLogger("transformers").propagate = False
    assert not [record.getMessage() for record in caplog.records if "keys in the checkpoint" in record.getMessage()]
    first, second = (each.model.state_dict() for each in (whole, resumed))  # type: ignore[union-attr]
    assert resumed.state.global_step == 4 and all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_no_guard_is_still_reported() -> None:
    model = model_of("bert")
    name = f"{model.embedding_name()}.weight"
    weights = model.state_dict()
    assert model.load_state_dict({**weights, name: torch.zeros(0)}, strict=False).unexpected_keys == []
    assert model.load_state_dict({**weights, name: torch.zeros(120, 16)}, strict=False).unexpected_keys == [name]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**weights, name: torch.zeros(120, 16)})
    model.load_state_dict({**weights, name: torch.zeros(0)})


@pytest.mark.parametrize("causal", [False, True])
def test_label_smoothing_knows_which_labels_to_shift(causal: bool, tmp_path: Path) -> None:
    if causal:
        sizes = SIZE | {"num_key_value_heads": 1}
        model = replace_embeddings(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)), TABLE)
    else:
        model = model_of("roberta")
    rows = masked_rows((3, 5, 2, 4))
    run = trainer(model, rows, tmp_path, label_smoothing_factor=0.1)
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    logits, labels = model(batch["input_ids"]).logits.double(), batch["labels"]
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert run.compute_loss(run.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
