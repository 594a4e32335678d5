"""Run several recipes one after the other in one process per rank: the start of torch and DeepSpeed is paid once.

    python tests/pretrain/run_recipes.py LIST.json RESULTS.json      (or under torchrun, for more ranks)

LIST.json holds [{"arguments": [...], "nan_on": [rank, call], "shards": true}, ...]. RESULTS.json gets, for each, of
every rank the exit code or the text of the UserError; with "shards" what the rank holds of each parameter at the end
of a step: {name: [elements kept, elements of its shard, elements of the whole]}.
"""

import json
import sys
from pathlib import Path

from ksub_ds import KSubRobertaForMaskedLM
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain import loop
from ksub_ds.pretrain.recipe import parse_recipe
from ksub_ds.pretrain.run import run

FORWARD, TRAIN_STEP = KSubRobertaForMaskedLM.forward, loop.train_step


def fail_once(rank: int, call: int) -> None:
    """From now on, the `call`-th forward pass of training on this rank gives a NaN: a broken machine."""
    calls = 0

    def forward(self, *arguments, **keywords):
        nonlocal calls
        output = FORWARD(self, *arguments, **keywords)
        calls += 1
        if calls == call and distributed.rank() == rank:
            output["loss"] = output.loss * float("nan")
        return output

    KSubRobertaForMaskedLM.forward = forward


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
    if "shards" in entry:
        look_at_shards(held)
    if "nan_on" in entry:
        fail_once(*entry["nan_on"])
    try:
        return run(parse_recipe(entry["arguments"])) or held or 0
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
