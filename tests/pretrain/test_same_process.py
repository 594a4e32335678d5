"""A second pretraining in the same process, as in a notebook, is like the first one in a process of its own."""

import json
import subprocess
import sys

import pytest

from .runs import Bench, environment, losses, state_bytes

pytestmark = [pytest.mark.long, pytest.mark.timeout(200)]
NOTEBOOK = """
import json, sys
from ksub_ds.pretrain.__main__ import main

print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def test_two_trainings_in_one_process(bench: Bench) -> None:
    small = {"max_steps": 3, "eval_every": 0}
    starts = [bench.arguments(name, **small) for name in ("notebook-first", "notebook-second")]
    starts.insert(1, bench.arguments("notebook-bad", data=bench.folder / "nowhere"))
    starts.insert(2, bench.arguments("notebook-zero3", deepspeed="zero3", **small))
    command = [sys.executable, "-c", NOTEBOOK, json.dumps(starts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 2, 0, 0], done.stderr
    first, second = (bench.folder / name for name in ("notebook-first", "notebook-second"))
    assert losses(first) == losses(second)
    assert state_bytes(first, 3) == state_bytes(second, 3)
    assert (first / "train.log").read_text().count("done: step 3") == 1, "the second run writes to its own log"
