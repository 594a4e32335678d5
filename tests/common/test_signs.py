"""What the watchdog takes for waiting."""

import contextlib
import functools
import threading
import time

from ksub_ds.common import distributed
from ksub_ds.common.watchdog import main_thread_place


class Queued:
    """A number on a GPU, behind a collective that does not end."""

    item = functools.partial(time.sleep, 0.5)  # a call without a frame of Python


def place_during(call) -> tuple[bool, str]:
    seen: list[tuple[bool, str]] = []
    watcher = threading.Timer(0.2, lambda: seen.append(main_thread_place()))
    watcher.start()
    with contextlib.suppress(TypeError):  # what sleeps gives no number
        call()
    watcher.join()
    return seen[0]


def test_who_reads_a_number_waits_and_who_works_does_not() -> None:
    waits, where = place_during(lambda: distributed.to_number(Queued()))
    assert waits and where.startswith("to_number")
    waits, where = place_during(lambda: distributed.on_main(working))
    assert not waits and where.startswith("working")


def working() -> None:
    time.sleep(0.5)
