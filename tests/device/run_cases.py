"""Run what a GPU runs on the fake accelerator, and write what it waited for and copied: {case: report}.

    TRITON_INTERPRET=1 python tests/device/run_cases.py REPORTS.json [case ...]

A process of its own, because the accelerator cannot be taken out of one again. Each case prepares on the CPU, moves to
the device, and records only what it is about. Where the CPU computes the same, the results are compared too: branches
that only a GPU takes are then tested for what they give, not only for what they wait for.

Not covered: DeepSpeed's engine, whose part of a step is played by torch's AdamW and clipping, as its ZeRO stage 0 does
(`PlainEngine`); several ranks; torch.compile; kernels of Triton.
"""

import contextlib
import copy
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from fake_accelerator import NAME, FakeAccelerator, Record, host, note_kernel
from torch import Tensor

from ksub_ds import CodeTable, compress, factorized_cross_entropy, plain_codes, positional_codes, replace_embeddings
from ksub_ds.common import distributed
from ksub_ds.common.watchdog import Watchdog
from ksub_ds.contraction import code_structure
from ksub_ds.contraction.fused import FusedContraction
from ksub_ds.convert.export import compare_with_reload
from ksub_ds.corpus.masking import MaskingRule, next_tokens
from ksub_ds.evaluate.finetune.classifier import load_classifier
from ksub_ds.evaluate.finetune.encoding import Encoded
from ksub_ds.evaluate.finetune.loop import FineTuning, finetune
from ksub_ds.evaluate.finetune.scoring import predict
from ksub_ds.model.causal_lm import KSubLlamaConfig, SubCausalLM
from ksub_ds.model.configuration import KSubRobertaConfig
from ksub_ds.model.distillation import Teacher
from ksub_ds.model.embedding import SubEmbedding
from ksub_ds.model.presets import fresh_model, small_modernbert
from ksub_ds.model.replacement import to_plain
from ksub_ds.pretrain import engine
from ksub_ds.pretrain.engine import GuardedUpdate, build_optimizer, compute_in_bf16
from ksub_ds.pretrain.heldout_eval import accuracy_key, evaluate
from ksub_ds.pretrain.loop import finish_step, train_step
from ksub_ds.pretrain.prefetch import BatchPrefetcher, model_inputs
from ksub_ds.pretrain.schedule import TrainingPlan

N, DIM, ROWS, LENGTH = 40, 24, 4, 12
CODES: dict[str, CodeTable] = {
    "plain": plain_codes(N),
    "positional": positional_codes(N, 3),
    # as balanced clusters are: all prefixes in use, and an eighth of the last table behind each
    "clustered": CodeTable(
        np.stack([np.arange(N) % 16 // 4, np.arange(N) % 4, np.arange(N) * 7 // 16 % 16], axis=1), (4, 4, 16)
    ),
}
# no two prefixes alike, and a large last table: sparse matrices
_chosen = np.random.default_rng(0).choice(5 * 5 * 5 * 60, N, replace=False)
CODES["scattered"] = CodeTable(np.stack(np.unravel_index(_chosen, (5, 5, 5, 60)), axis=1), (5, 5, 5, 60))
CODES["dedicated"] = CodeTable(CODES["clustered"].codes, (4, 4, 16), dedicated=[0, 7, *range(20, 30)])
CASES: dict[str, Callable[[FakeAccelerator], Record]] = {}


def case(name: str, **arguments: Any) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        CASES[name] = lambda accelerator: function(accelerator, **arguments)
        return function

    return add


# ---------------------------------------------------------------- what the cases work on


def network(family: str = "roberta", codes: str = "clustered", bias: bool = True, **fields: Any) -> Any:
    """A language model without dropout, in evaluation mode, on the CPU."""
    torch.manual_seed(0)
    shape = {"vocab_size": N, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "decoder_bias": bias} | fields
    makers = {"roberta": KSubRobertaConfig, "modernbert": small_modernbert, "llama": KSubLlamaConfig}
    config = makers[family](**shape)
    model = fresh_model(config, CODES[codes])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def arrays(padded: bool = True, seed: int = 1) -> dict[str, np.ndarray]:
    """A batch as the training makes it."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, N, (ROWS, LENGTH))
    batch = {"input_ids": ids, "labels": np.where(draw.random(ids.shape) < 0.3, ids, -100)}
    if padded:
        batch["attention_mask"] = np.ones_like(ids)
        batch["attention_mask"][-1, 8:] = 0
        batch["labels"][-1, 8:] = -100
    return batch


def listed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The labels as training gives them: places and targets, filled up to a number that does not depend on the data."""
    return model_inputs(batch, MaskingRule(0.3, 3, (0, 1, 2), N), True)


def tensors(batch: dict[str, np.ndarray], device: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def on_device(model: Any) -> Any:
    return copy.deepcopy(model).to(NAME)


def same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(host(ours), theirs, rtol=tolerance, atol=tolerance)


def gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def encoded() -> Encoded:
    """Rows of other lengths, with two classes."""
    lengths = np.arange(3, 11)
    ids = np.random.default_rng(0).integers(5, N, lengths.sum()).astype(np.int32)
    return Encoded(ids, None, np.cumsum(lengths), (np.arange(8) % 2).astype(np.float64), 1)


# ---------------------------------------------------------------- model and loss


def forward_and_backward(accelerator: FakeAccelerator, labels: bool = False, **form: Any) -> Record:
    """As training does, or with labels in the place of their tokens, as others do."""
    expected, batch = network(**form), arrays()
    model, inputs = on_device(expected), tensors(batch if labels else listed(batch), NAME)
    warm_up(model)
    with accelerator.recorded() as record:
        loss = model(**inputs, loss_reduction="sum").loss
        loss.backward()
    reference = expected(**tensors(batch, "cpu"), loss_reduction="sum").loss
    reference.backward()
    same(loss, reference)
    # A dense block has products of bf16 parts on an accelerator; 5e-6 of the largest gradients.
    same(gradients(model), gradients(expected), 1e-4 if form.get("codes") in ("plain", "dedicated") else 1e-5)
    return record


def warm_up(model: Any) -> None:
    """Have the structures of the codes built: once in a run, so no step pays for it (`first use` does here)."""
    structure = model.get_input_embeddings().structure
    _ = structure.weighted, structure.unweighted, structure.fused
    _ = structure.best_weighted, structure.best_unweighted, structure.search


for family in ("roberta", "modernbert"):
    for codes in ("plain", "positional", "clustered"):
        for bias in (True, False):
            name = f"{family}, {codes} codes, {'with' if bias else 'no'} bias"
            case(name, family=family, codes=codes, bias=bias)(forward_and_backward)
case("labels in their places", labels=True)(forward_and_backward)
case("dedicated tokens", codes="dedicated")(forward_and_backward)


@case("autocast to bf16")
def autocast(accelerator: FakeAccelerator) -> Record:
    expected, batch = network(), arrays()
    model, inputs = on_device(expected), tensors(listed(batch), NAME)
    warm_up(model)
    with accelerator.recorded() as record, torch.autocast(NAME, torch.bfloat16):
        output = model(**inputs, output_hidden_states=True)
        output.loss.backward()
    assert output.hidden_states[-1].dtype == torch.float32 and output.loss.dtype == torch.float32
    assert {each.dtype for each in gradients(model)} == {torch.float32}
    same(output.loss, expected(**tensors(batch, "cpu")).loss, 0.02)
    return record


def loss_alone(accelerator: FakeAccelerator, codes: str, bias: bool) -> Record:
    torch.manual_seed(0)
    layer = SubEmbedding(CODES[codes], DIM)
    hidden, offsets = torch.randn(50, DIM, requires_grad=True), torch.randn(N, requires_grad=True)
    labels = torch.arange(50) % N
    labels[::7] = -100
    theirs = copy.deepcopy(layer).to(NAME)
    ours = [each.detach().to(NAME).requires_grad_() for each in (hidden, offsets)]
    moved = labels.to(NAME)
    _ = theirs.structure.weighted, theirs.structure.unweighted
    with accelerator.recorded() as record:
        loss = factorized_cross_entropy(ours[0], theirs, moved, ours[1] if bias else None)
        loss.backward()
    reference = factorized_cross_entropy(hidden, layer, labels, offsets if bias else None)
    reference.backward()
    same(loss, reference)
    same([ours[0].grad, *gradients(theirs)], [hidden.grad, *gradients(layer)])
    if bias:
        same(ours[1].grad, offsets.grad)
    return record


for codes in CODES:
    for bias in (True, False):
        case(f"loss, {codes} codes, {'with' if bias else 'no'} bias", codes=codes, bias=bias)(loss_alone)


@case("first use after a move")
def first_use(accelerator: FakeAccelerator) -> Record:
    """The trie and its contraction are built for the device, again where the model goes elsewhere."""
    model, batch = network(), arrays()
    reference = model(**tensors(batch, "cpu")).loss
    inputs = tensors(batch, NAME)
    with accelerator.recorded() as record:
        model.to(NAME)
        loss = model(**inputs).loss
    same(loss, reference.detach())
    model.to("cpu")
    same(model(**tensors(batch, "cpu")).loss, reference)
    return record


@case("trainer's evaluation")
def trainer_evaluation(accelerator: FakeAccelerator) -> Record:
    """What transformers' Trainer asks for: a loss by the number of items, and predictions."""
    expected, batch = network(), arrays()
    model, inputs = on_device(expected), tensors(batch, NAME)
    items = torch.tensor(7, device=NAME)
    warm_up(model)
    with accelerator.recorded() as record:
        output = model(**inputs, num_items_in_batch=items)
    reference = expected(**tensors(batch, "cpu"), num_items_in_batch=torch.tensor(7))
    same(output.loss, reference.loss)
    same(output["predictions"], reference["predictions"])
    return record


@case("top k")
def top_k(accelerator: FakeAccelerator) -> Record:
    """Decoded prediction: the most probable tokens at the masks, as numbers of the host."""
    expected, batch = network(), arrays()
    model, inputs = on_device(expected), tensors(batch, NAME)
    inputs["positions"] = inputs.pop("labels") != -100
    warm_up(model)
    with accelerator.recorded() as record:
        probabilities, ids = model.predict_topk(**inputs, k=3)
        found = ids.tolist()
    reference = tensors(batch, "cpu")
    reference["positions"] = reference.pop("labels") != -100
    same(probabilities, expected.predict_topk(**reference, k=3)[0])
    assert found == expected.predict_topk(**reference, k=3)[1].tolist()
    return record


@case("logits")
def logits(accelerator: FakeAccelerator) -> Record:
    expected, batch = network(), arrays()
    model, inputs = on_device(expected), tensors(batch, NAME)
    del inputs["labels"]
    with accelerator.recorded() as record, torch.no_grad():
        output = model(**inputs).logits
    same(output, expected(**{name: torch.from_numpy(batch[name]) for name in inputs}).logits)
    return record


# ---------------------------------------------------------------- training


class PlainEngine:
    """DeepSpeed's ZeRO stage 0 on one rank, as far as the loop sees it: torch's optimizer and nothing else."""

    config: ClassVar[dict[str, Any]] = {}
    dp_world_size = 1

    def __init__(self, model: Any):
        self.module = model
        self.optimizer = self.basic_optimizer = build_optimizer(model, 1e-3, (0.9, 0.98), 1e-6, 0.01)

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor, **_: Any) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.at_boundary = last

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_optimization(self) -> bool:
        return False

    def fp16_enabled(self) -> bool:
        return False


@contextlib.contextmanager
def on_the_accelerator() -> Iterator[None]:
    """The programs' device is the accelerator."""
    device = torch.device(NAME, 0)
    with contextlib.ExitStack() as patches:
        for module in (distributed, engine):
            patches.enter_context(patch.object(module, "device", lambda: device))
        yield


class Batches:
    """Rows of which nothing is padded, as training has them; the interface of `TrainingBatches`."""

    rule = MaskingRule(0.3, 3, (0, 1, 2), N)

    def batch(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        return arrays(padded=False, seed=step + start)


class CausalBatches(Batches):
    """The same rows for a causal model."""

    rule = MaskingRule(None, 3, (0, 1, 2), N)

    def batch(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        input_ids, labels = next_tokens(ids := super().batch(step, start, stop)["input_ids"], ids == 1)
        return {"input_ids": input_ids, "labels": labels}


class Run:
    """What the loop works on, in little; the report of a step is read as the loop reads it."""

    def __init__(self, model: Any, teacher: Teacher | None, precision: str):
        plan = TrainingPlan("linear", 1e-3, 0, 9)
        causal = isinstance(model, SubCausalLM)
        recipe = SimpleNamespace(
            seed=0, log_every_steps=10, precision=precision, distill_weight=0.5, plan=lambda: plan, is_causal=causal
        )
        nobody = SimpleNamespace(reason=lambda: None, problem=None, has_failed=lambda: False, finish=lambda: None)
        metrics = SimpleNamespace(problem=None, step=lambda step, loss, total, **more: self.lines.append((loss, more)))
        if precision == "bf16":
            compute_in_bf16(model)
        engine = PlainEngine(model)
        self.lines: list[Any] = []
        self.model, self.prefetcher = model, BatchPrefetcher(CausalBatches() if causal else Batches(), ROWS, 2, 0, 1)
        self.training: Any = SimpleNamespace(
            recipe=recipe, engine=engine, update=GuardedUpdate(engine, 1.0), teacher=teacher, stop=nobody,
            metrics=metrics, checkpoints=nobody, folder=SimpleNamespace(checkpoints=Path("nowhere")),
        )  # fmt: skip

    def step(self, number: int) -> None:
        flight = train_step(self.training, self.prefetcher.take(number - 1), number)
        finish_step(self.training, SimpleNamespace(tokens=0), flight)


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """The accelerator has kernels of Triton: its interpreter runs them on what the tensors hold, unrecorded."""

    def run(box: FusedContraction, kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        note_kernel(kernel)
        getattr(box.kernels, kernel)[grid](*host(list(arguments)), **constants)

    def why_not_here(device: torch.device) -> str | None:
        return None if device.type == NAME else "the CPU is what it is compared with"

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.dict(os.environ, TRITON_INTERPRET="1"))
        patches.enter_context(patch.object(code_structure, "why_not_here", why_not_here))
        patches.enter_context(patch.object(FusedContraction, "run", run))
        yield


def optimizer_step(
    accelerator: FakeAccelerator, number: int, distil: bool = False, precision: str = "fp32", family: str = "roberta"
) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        teachers: list[Any] = [None, None]
        if distil:
            network().save_pretrained(folder)
            teachers = [Teacher(folder, CODES["clustered"], device) for device in ("cpu", NAME)]
        model = network(family).train()
        expected = Run(copy.deepcopy(model), teachers[0], "fp32")
    with on_the_accelerator():
        ours = Run(on_device(model), teachers[1], precision)
        warm_up(ours.model)
        with accelerator.recorded() as record:
            ours.step(number)
    expected.step(number)
    (loss, more), (reference, wanted) = ours.lines[-1], expected.lines[-1]
    tolerance = 1e-5 if precision == "fp32" else 0.02
    assert abs(loss - reference) < tolerance
    key = accuracy_key(family == "llama")
    assert more[key] == wanted[key]
    assert abs(more["grad_norm"] - wanted["grad_norm"]) < tolerance * wanted["grad_norm"]
    return record


def fused_step(accelerator: FakeAccelerator) -> Record:
    with fused_kernels():
        return optimizer_step(accelerator, number=10)


case("optimizer step", number=1)(optimizer_step)
case("optimizer step with accuracy", number=10)(optimizer_step)
case("optimizer step with a teacher", number=1, distil=True)(optimizer_step)
case("optimizer step of a causal model", number=10, family="llama")(optimizer_step)
case("optimizer step in bf16", number=1, precision="bf16")(optimizer_step)
if find_spec("triton"):
    case("optimizer step with the fused loss")(fused_step)


@case("a step that is not finite")
def not_finite(accelerator: FakeAccelerator) -> Record:
    """The device itself leaves weights and moments as they are, in this step and in those that follow."""
    with on_the_accelerator():
        run = Run(on_device(network()), None, "fp32")
        run.step(1)
        before = state(run)
        broken, sound = run.prefetcher.take(1), run.prefetcher.take(2)
        run.training.engine.backward = lambda loss, **_: (loss * float("nan")).backward()
        with accelerator.recorded() as record:
            train_step(run.training, broken, 2)
            del run.training.engine.backward
            train_step(run.training, sound, 3)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(state(run), before, strict=True))
    return record


def state(run: Run) -> list[Tensor]:
    """A copy of all weights and moments."""
    moments = [each for of_weight in run.training.engine.optimizer.state.values() for each in of_weight.values()]
    return [each.clone() for each in host([*run.model.state_dict().values(), *moments])]


class HeldOut:
    """The interface of `HeldOutBatches`."""

    rule = Batches.rule

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        return iter(
            [("en", arrays(seed=1)), ("en", arrays(padded=False, seed=2)), ("tr", arrays(padded=False, seed=3))]
        )


@case("held-out evaluation")
def held_out(accelerator: FakeAccelerator) -> Record:
    expected = network()
    model = on_device(expected)
    warm_up(model)
    with on_the_accelerator(), accelerator.recorded() as record:
        scores = evaluate(model, HeldOut(), ["en", "tr"])
    reference = evaluate(expected, HeldOut(), ["en", "tr"])
    assert scores["masked_accuracy"] == reference["masked_accuracy"]
    assert abs(scores["loss"] - reference["loss"]) < 1e-5
    return record


@case("a teacher of another family")
def plain_teacher(accelerator: FakeAccelerator) -> Record:
    batch = tensors(listed(arrays()), "cpu")
    with tempfile.TemporaryDirectory() as folder:
        to_plain(network("modernbert", "plain")).save_pretrained(folder)
        expected, teacher = (Teacher(folder, CODES["clustered"], device) for device in ("cpu", NAME))
    inputs = {name: each.to(NAME) for name, each in batch.items()}
    with accelerator.recorded() as record:
        soft = teacher.targets(**inputs)
    same(list(soft), list(expected.targets(**batch)))
    return record


# ---------------------------------------------------------------- fine-tuning, other forms


def fine_tuning(accelerator: FakeAccelerator, precision: str) -> Record:
    data = encoded()
    settings = FineTuning(1, 4, 1e-3, seed=0, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        network(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder)
        expected, model = (load_classifier(folder, 2, 0) for _ in range(2))
        model.to(NAME)
        work = [Path(folder) / name for name in ("cpu", "device")]
        for each in work:
            each.mkdir()
        scores = []

        def validate(trained: Any, _: Any) -> dict[str, Any]:
            scores.append(predict(trained, data, precision))
            return {"score": 0.0}

        reference = finetune(expected, data, settings, validate, work[0], "")
        with accelerator.recorded() as record:
            outcome = finetune(model, data, settings, validate, work[1], "")
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert abs(outcome.epochs[0]["loss"] - reference.epochs[0]["loss"]) < tolerance
    np.testing.assert_allclose(scores[1], scores[0], atol=tolerance)
    return record


case("fine-tuning", precision="fp32")(fine_tuning)
case("fine-tuning in bf16", precision="bf16")(fine_tuning)


@case("export's comparison")
def export(accelerator: FakeAccelerator) -> Record:
    """A model is saved from its device; the comparison is of two on the CPU, wherever the run was."""
    model = network()
    moved = on_device(model)
    with tempfile.TemporaryDirectory() as folder, accelerator.recorded() as record:
        moved.save_pretrained(folder)
        assert compare_with_reload(model, Path(folder), None) < 1e-5
    return record


@case("other embeddings")
def conversions(accelerator: FakeAccelerator) -> Record:
    """Compressed, replaced, written out: a model stays on its device."""
    model, batch = network(), arrays()
    plain = to_plain(model)
    moved = copy.deepcopy(plain).to(NAME)
    with accelerator.recorded() as record:
        made = [compress(moved, CODES["positional"]), replace_embeddings(moved, CODES["plain"])]
        written = to_plain(made[0])
    assert {each.device.type for each in (*made, written)} == {NAME}
    inputs = {"input_ids": torch.from_numpy(batch["input_ids"])}
    expected = compress(plain, CODES["positional"])(**inputs).logits
    same(written(input_ids=inputs["input_ids"].to(NAME)).logits, expected)
    return record


@case("new tokens")
def resize(accelerator: FakeAccelerator) -> Record:
    expected = network()
    model = on_device(expected)
    vectors = np.random.default_rng(0).standard_normal((2, DIM))
    ids = torch.tensor([[N, N + 1, N + 2, 7]])
    moved = ids.to(NAME)
    with accelerator.recorded() as record:
        model.resize_token_embeddings(N + 2, vectors=vectors)
        model.resize_token_embeddings(N + 3)
        loss = model(moved, labels=moved).loss
    expected.resize_token_embeddings(N + 2, vectors=vectors)
    expected.resize_token_embeddings(N + 3)
    same(loss, expected(ids, labels=ids).loss)
    return record


# ---------------------------------------------------------------- the accelerator itself


@case("the accelerator: what it counts")
def counts(accelerator: FakeAccelerator) -> Record:
    with accelerator.recorded() as record:
        values = torch.arange(6.0).to(NAME)
        chosen = values[values > 2]  # a wait, and its size is true
        assert len(chosen) == 3 and len(values.nonzero()) == 5
        assert float(chosen.sum()) == 12.0 and chosen.cpu().numpy().tolist() == [3, 4, 5]
        (values.double() * 2).sum()
        torch.tensor([1.0], device=NAME)
    return record


@case("the accelerator: what it refuses")
def refusals(accelerator: FakeAccelerator) -> Record:
    with accelerator.recorded() as record:
        values = torch.ones(3, device=NAME)
        _ = values * torch.tensor(2.0)  # a number of the host may join
        for wrong in (lambda: values + torch.ones(3), lambda: values.numpy(), lambda: np.asarray(values)):
            try:
                wrong()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("a mix of devices passed")
    return record


# ---------------------------------------------------------------- running them


def reports(accelerator: FakeAccelerator, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    distributed._watchdog = Watchdog(0, ["here"])
    for name in names or CASES:
        start = time.perf_counter()
        try:
            record = CASES[name](accelerator)
        except Exception:
            yield name, {"error": traceback.format_exc()}
            continue
        report: dict[str, Any] = {"lines": record.lines, "seconds": round(time.perf_counter() - start, 2)}
        for kind in ("waits", "copies", "doubles", "kernels"):
            report[kind] = [[*event, count] for event, count in getattr(record, kind).items()]
        yield name, report


def main(target: str, names: list[str]) -> None:
    if find_spec("triton"):
        import triton.language  # noqa: F401 - with the interpreter for its own functions; only one case has it later

    os.environ.pop("TRITON_INTERPRET", None)
    try:
        accelerator = FakeAccelerator()
    except (ImportError, AttributeError) as error:
        found = {"skipped": f"this torch makes no devices in Python: {error}"}
    else:
        found = dict(reports(accelerator, names))
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
