"""Run several recipes one after the other in one process per rank: the start of torch and DeepSpeed is paid once.

    python tests/pretrain/run_recipes.py LIST.json RESULTS.json      (or under torchrun, for more ranks)

LIST.json holds [{"arguments": [...], "nan_on": [rank, call]}, ...]. RESULTS.json gets, for each, the exit code or the
text of the UserError, of every rank.
"""

import json
import sys
from pathlib import Path

import tyro

from ksub_ds import KSubRobertaForMaskedLM
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.pretrain.recipe import Recipe
from ksub_ds.pretrain.run import run

FORWARD = KSubRobertaForMaskedLM.forward


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


def outcome(entry: dict) -> int | str:
    KSubRobertaForMaskedLM.forward = FORWARD
    if "nan_on" in entry:
        fail_once(*entry["nan_on"])
    try:
        return run(tyro.cli(Recipe, args=entry["arguments"]))
    except UserError as error:
        return str(error)


def main() -> None:
    entries = json.loads(Path(sys.argv[1]).read_text())
    results = [distributed.gather_objects(outcome(entry)) for entry in entries]
    if distributed.is_main():
        Path(sys.argv[2]).write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main()
