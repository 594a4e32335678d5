"""Heads for tasks, for every family that transformers has them for: what they compute, keep, save and refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from ksub_ds import CodeTable, positional_codes, replace_embeddings
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.replacement import to_plain

SIZE = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CAUSAL = SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES = {
    "bert": SIZE,
    "roberta": SIZE | {"max_position_embeddings": 40},
    "roberta, padded by 3": SIZE | {"max_position_embeddings": 40, "pad_token_id": 3},
    "xlm-roberta": SIZE | {"max_position_embeddings": 40},
    "camembert": SIZE | {"max_position_embeddings": 40},
    "electra": SIZE | {"embedding_size": 12},
    "distilbert": {"vocab_size": 120, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "modernbert": SIZE
    | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
    "llama": CAUSAL,
    "mistral": CAUSAL,
    "qwen3": CAUSAL | {"head_dim": 8},
    "gemma3_text": CAUSAL | {"head_dim": 8, "layer_types": ["full_attention"]},
    "gpt2": {"vocab_size": 120, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "pad_token_id": 0},
}
TASKS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "choice": AutoModelForMultipleChoice,
}
ENCODERS = list(FAMILIES)[:8]
CASES = [(family, task) for family in ENCODERS for task in TASKS]
CASES += [(family, task) for family in ("llama", "mistral", "qwen3", "gpt2") for task in list(TASKS)[:3]]
CASES += [("gemma3_text", "sequence")]  # the one that transformers has
TABLE = CodeTable(np.random.default_rng(0).permutation(positional_codes(120, 3).codes), [5, 5, 5])


def plain_model(family: str, task: str) -> Any:
    torch.manual_seed(0)
    labels = {} if task == "question" else {"id2label": {0: "bird", 1: "house", 2: "river"}}
    config = AutoConfig.for_model(family.partition(",")[0], **FAMILIES[family], **labels)
    model = TASKS[task].from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(task: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(5, 120, (2, 12), generator=draw), torch.ones(2, 12, dtype=torch.long)
    ids[1, 8:], mask[1, 8:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "choice":
        return {name: each.view(2, 2, 6) for name, each in inputs.items()} | {"labels": torch.tensor([1, 0])}
    if task == "question":
        return inputs | {"start_positions": torch.tensor([2, 0]), "end_positions": torch.tensor([9, 5])}
    labels = {"sequence": torch.tensor([2, 0]), "token": torch.randint(3, (2, 12), generator=draw)}
    return inputs | {"labels": labels[task].masked_fill(mask == 0, -100) if task == "token" else labels[task]}


def outputs(model: Any, task: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: each for name, each in model(**batch(task)).items() if isinstance(each, torch.Tensor)}


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_head_reads_the_tables_as_it_reads_their_matrix(family: str, task: str, tmp_path: Path) -> None:
    source = plain_model(family, task).double()
    model: Any = replace_embeddings(source, TABLE)
    assert isinstance(model.get_input_embeddings(), SubEmbedding)
    assert not any(120 in each.shape for each in model.parameters()), "nothing has a row per token"
    with torch.no_grad():
        source.get_input_embeddings().weight.copy_(model.get_input_embeddings().dense_weight())
    expected = outputs(source, task)
    assert "loss" in expected and len(expected) == (3 if task == "question" else 2)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(outputs(model, task), expected, **close)
    model(**batch(task)).loss.backward()
    assert all(table.grad.abs().max() > 0 for table in model.get_input_embeddings().tables)

    # Through a folder that is moved, and as a plain model.
    model.float().save_pretrained(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    again = TASKS[task].from_pretrained(tmp_path / "there").eval()
    assert type(again) is type(model) and again.config.id2label == source.config.id2label
    theirs = again.state_dict()
    assert all(torch.equal(each, theirs[name]) for name, each in model.state_dict().items())
    assert all(torch.equal(each, outputs(model, task)[name]) for name, each in outputs(again, task).items())
    plain = to_plain(again.double(), type(source))
    assert type(plain) is type(source) and plain.config.id2label == source.config.id2label
    torch.testing.assert_close(outputs(plain, task), outputs(again, task), **close)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(source).from_pretrained(tmp_path / "there")


@pytest.mark.parametrize(("family", "pretrained"), [("bert", AutoModelForMaskedLM), ("mistral", AutoModelForCausalLM)])
def test_a_pretrained_folder_is_where_a_task_begins(family: str, pretrained: Any, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = replace_embeddings(pretrained.from_config(config), TABLE)
    model.save_pretrained(tmp_path)
    for auto in (each for task, each in TASKS.items() if (family, task) in CASES):
        other = auto.from_pretrained(tmp_path)
        theirs = other.base_model.state_dict()
        for name, value in model.base_model.state_dict().items():
            assert torch.equal(value, theirs[name]), (auto, name)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of a batch, for the Trainer."""

    def __init__(self, task: str):
        self.batch = batch(task)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: each[index] for name, each in self.batch.items()}


def train(model: Any, task: str, folder: Path) -> None:
    """Train two steps, and save the model in `folder`/saved."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(task))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.evaluate(Rows(task))["eval_loss"] > 0
    trainer.save_model(str(folder / "saved"))


@pytest.mark.parametrize(("family", "task"), [("bert", "token"), ("xlm-roberta", "question"), ("gpt2", "question")])
def test_two_steps_of_the_trainer(family: str, task: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate (pip install -e '.[test]')")
    model: Any = replace_embeddings(plain_model(family, task), TABLE)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    train(model, task, tmp_path)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {name for name in before if ".tables." in name or "classifier" in name or "qa_outputs" in name} <= changed
    again = TASKS[task].from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(outputs(again, task), outputs(model.eval(), task))


@pytest.mark.parametrize(
    ("family", "task", "kind"), [("roberta", "token", "TOKEN_CLS"), ("llama", "sequence", "SEQ_CLS")]
)
def test_two_steps_of_an_adapter(family: str, task: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional: pip install peft")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate (pip install -e '.[test]')")
    source = plain_model(family, task)
    model: Any = replace_embeddings(source, TABLE)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=kind))
    untrained = outputs(adapted.eval(), task)
    train(adapted, task, tmp_path)
    trained = outputs(adapted.eval(), task)
    assert not torch.equal(trained["logits"], untrained["logits"])
    base = TASKS[task].from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(outputs(base, task), untrained)  # the head in it is the first one
    again = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    torch.testing.assert_close(outputs(again, task), trained)
    torch.testing.assert_close(outputs(again.merge_and_unload(), task), trained)
