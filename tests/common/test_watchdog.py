"""What the watchdog sees: the main thread that waits, the heartbeats of the ranks."""

import contextlib
import functools
import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from ksub_ds.common import distributed
from ksub_ds.common.exit_codes import FAILED
from ksub_ds.common.watchdog import Heartbeats, MainThread, Watchdog, main_thread_frame


class Queued:
    """Numbers on a GPU, behind a collective that does not end."""

    is_cuda = False
    tolist = functools.partial(time.sleep, 0.5)  # a call without a frame of Python


def frame_during(call) -> tuple[bool, str]:
    seen: list[tuple[bool, str]] = []
    watcher = threading.Timer(0.2, lambda: seen.append(main_thread_frame()))
    watcher.start()
    with contextlib.suppress(TypeError):  # a sleep returns no number
        call()
    watcher.join()
    return seen[0]


def test_reading_a_number_is_waiting_and_working_is_not() -> None:
    waits, where = frame_during(distributed.NumbersToRead(Queued()).read)
    assert waits and where.startswith("read")
    waits, where = frame_during(lambda: distributed.on_main(working))
    assert not waits and where.startswith("working")


def working() -> None:
    time.sleep(0.5)


class Store:
    """Heartbeats as ranks write them, in a real store."""

    def __init__(self, ranks: int):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        self.seen = Heartbeats(ranks)

    def beat(self, rank: int, count: int, position: int, waits: bool = False) -> None:
        self.store.set(f"beat/{rank}", json.dumps([count, position, waits, f"step {position}", "wait (c10d.py:1)"]))


def test_the_rank_that_hangs() -> None:
    """The rank behind the others; of ranks at the same point, the one in no collective."""
    watch = Store(3)
    for rank, position, waits in ((0, 7, True), (1, 6, True), (2, 7, True)):
        watch.beat(rank, 1, position, waits)
    watch.seen.read(watch.store)
    assert watch.seen.hanging() == (1, MainThread(6, True, "step 6", "wait (c10d.py:1)"))
    for rank, waits in ((0, True), (1, True), (2, False)):
        watch.beat(rank, 2, 7, waits)
    watch.seen.read(watch.store)
    hanging = watch.seen.hanging()
    assert hanging is not None and hanging[0] == 2 and watch.seen.anyone_waits()
    watch.beat(2, 3, 7, True)
    watch.seen.read(watch.store)
    assert watch.seen.hanging() is None


def test_the_rank_that_is_silent() -> None:
    watch = Store(2)
    watch.beat(0, 1, 1)
    watch.beat(1, 1, 1)
    watch.seen.read(watch.store)
    time.sleep(0.1)
    watch.beat(0, 2, 1)
    watch.seen.read(watch.store)
    assert watch.seen.silent(0.05) == [1] and watch.seen.silent(5) == []
    watch.store.set("beat/1", "done")  # a rank that has finished may be silent
    watch.seen.read(watch.store)
    assert watch.seen.silent(0.05) == []


@pytest.mark.parametrize(
    ("error", "step", "again"),
    [
        (ImportError("no module"), None, False),
        (TypeError("Descriptors cannot be created directly"), None, False),
        (RuntimeError("out of memory"), None, True),
        (KeyError("x"), 3, True),
        (TypeError("x"), 3, True),
    ],
)
def test_the_same_command_is_offered_where_it_helps(
    error: Exception, step: int | None, again: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Watchdog(0, ["node1"])
    alone.step = step
    assert alone.end_by(error) == FAILED
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("failed: rank 0 on node1") and last.endswith("; run the same command again to resume") == again
    )
