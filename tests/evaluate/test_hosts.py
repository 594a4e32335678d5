"""What the workers of `ksub evaluate --hostfile` end with together; real hosts are in tests/cluster."""

import sys

import pytest

from ksub_ds.common.exit_codes import DONE, USER_ERROR
from ksub_ds.evaluate import hosts

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (["pass", KILLED], DONE),
        ([KILLED, "raise SystemExit(70)"], 128 + 9),
        (["raise SystemExit(2)", "import time; time.sleep(60)"], USER_ERROR),
    ],
    ids=["one ended well", "killed", "mistake"],
)
def test_workers_have_one_exit_code(monkeypatch, programs, expected):
    def command(host, place, slots, arguments):
        return [sys.executable, "-c", programs[place]], None

    monkeypatch.setattr(hosts, "worker_command", command)
    assert hosts.start_workers({"localhost": len(programs)}, []) == expected
