"""Run several recipes one after the other in one process per rank: the start of torch and DeepSpeed is paid once.

    python tests/pretrain/run_recipes.py LIST.json RESULTS.json      (or under torchrun, for more ranks)

LIST.json holds [{"arguments": [...]}, ...], each with any of

    "nan_on": [rank, call]      the loss of this forward pass of training is a NaN, and so is its gradient
    "gradient_nan_on"           the same, but only the gradient
    "scale_exhausted_on"        DeepSpeed cannot halve fp16's loss scale any more in the update of this step
    "lag": 1                    steps in flight, as on a GPU
    "stop_at": step             there is a STOP file when this step is launched
    "reads": true               RUN/reads.json gets what the updates of each step have read on the host
    "masters": true             after a UserError, weights and moments are written to RUN/masters.safetensors
    "shards": true              the result is what the rank holds of each parameter at the end of a step:
                                {name: [elements kept, elements of its shard, elements of the whole]}

RESULTS.json gets, for each, of every rank the exit code or the text of the UserError.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import ksub_ds.pretrain.run as running
from ksub_ds import KSubRobertaForMaskedLM
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain import loop
from ksub_ds.pretrain.engine_state import collect_masters
from ksub_ds.pretrain.recipe import parse_recipe

READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
FORWARD, TRAIN_STEP, TRAIN = KSubRobertaForMaskedLM.forward, loop.train_step, running.train


class HostReads(TorchDispatchMode):
    """Notes where the host reads a tensor: on a GPU it would wait for it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in READS:
            self.found.append(str(function))
        return function(*arguments, **keywords or {})


class NanGradient(torch.autograd.Function):
    """The same number, with a gradient that is none."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def fail_once(rank: int, call: int, spoil) -> None:
    """From now on, the `call`-th forward pass of training on this rank gives a spoilt loss: a broken machine."""
    calls = 0

    def forward(self, *arguments, **keywords):
        nonlocal calls
        output = FORWARD(self, *arguments, **keywords)
        calls += self.training
        if self.training and calls == call and distributed.rank() == rank:
            output["loss"] = spoil(output.loss)
        return output

    KSubRobertaForMaskedLM.forward = forward


def train_as(entry: dict) -> None:
    """From now on, train with steps in flight, and keep the weights of a run that is refused."""

    def train(training, state):
        reads: list[list[str]] = []
        if "reads" in entry:
            watch_update(training.update, reads)
        if "scale_exhausted_on" in entry:
            exhaust_scale_on(entry["scale_exhausted_on"], training.engine)
        try:
            return TRAIN(training, state, entry.get("lag"))
        except UserError:
            masters = collect_masters(training.engine) if "masters" in entry else {}
            if masters:
                save_file(masters, training.folder.path / "masters.safetensors")
            raise
        finally:
            if "reads" in entry:
                (training.folder.path / "reads.json").write_text(json.dumps(reads))

    running.train = train


def watch_update(update, reads: list) -> None:
    """Note what is read on the host from the gradient's norm to the end of DeepSpeed's step."""
    norm, launch = update.squared_gradient_norm, update.launch

    def watched(function):
        def call(**keywords):
            with HostReads() as noted:
                result = function(**keywords)
            reads.append(noted.found)
            return result

        return call

    update.squared_gradient_norm, update.launch = watched(norm), watched(launch)


def exhaust_scale_on(step: int, engine) -> None:
    """Have the update of this step fail as DeepSpeed's fp16 optimizers do: on a CPU there is no fp16."""
    own_step = engine.step

    def step_engine():
        if engine.global_steps == step - 1:
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
        own_step()

    engine.step = step_engine


def stop_at(step: int) -> None:
    """From now on, ask for a stop when this step is launched."""

    def train_step(training, batches, number):
        if number == step:
            training.folder.stop.touch()
        return TRAIN_STEP(training, batches, number)

    loop.train_step = train_step


def look_at_shards(held: dict) -> None:
    """From now on, note after every step what this rank holds of each parameter."""

    def train_step(training, *arguments):
        result = TRAIN_STEP(training, *arguments)
        for name, parameter in training.engine.module.named_parameters():
            held[name] = [parameter.numel(), parameter.ds_tensor.numel(), parameter.ds_numel]
        return result

    loop.train_step = train_step


def outcome(entry: dict) -> int | str | dict:
    KSubRobertaForMaskedLM.forward, loop.train_step = FORWARD, TRAIN_STEP
    held: dict = {}
    train_as(entry)
    if "shards" in entry:
        look_at_shards(held)
    if "stop_at" in entry:
        stop_at(entry["stop_at"])
    if "nan_on" in entry:
        fail_once(*entry["nan_on"], lambda loss: loss * float("nan"))
    if "gradient_nan_on" in entry:
        fail_once(*entry["gradient_nan_on"], NanGradient.apply)
    try:
        return running.run(parse_recipe(entry["arguments"])) or held or 0
    except UserError as error:
        return str(error)


def main() -> None:
    entries = json.loads(Path(sys.argv[1]).read_text())
    results = [distributed.gather_objects(outcome(entry)) for entry in entries]
    if distributed.is_main():
        Path(sys.argv[2]).write_text(json.dumps(results))
    distributed.shutdown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
