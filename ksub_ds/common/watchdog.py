"""A thread in every rank that finds the rank that is missing, and ends the run with one line instead of a silent hang.

Every rank writes a heartbeat several times a second into a store of its own connection (torch's TCPStore, served by
rank 0 or by the launcher), with how far its main thread has progressed. Rank 0 reads them all:

    no heartbeat for `silence` seconds         the host is cut off, or the process is stopped
    no progress on any rank for `timeout` s    the rank that hangs is behind the others, and in no collective

A rank that fails by itself, or whose collective breaks because another rank has died, reports it in the same store.
The first to report prints the line; every other rank sees it, prints nothing, and ends with the same exit code.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ksub_ds.common.errors import RESUME
from ksub_ds.common.exit_codes import FAILED, INTERRUPTED, USER_ERROR
from ksub_ds.common.logging import format_seconds

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_SECONDS = 0.25  # between two heartbeats; more in runs of more than 125 ranks
DEAD_SECONDS = 1.5  # a rank whose collective broke takes peers for dead that are silent this long
LINGER_SECONDS = 3.0  # how long the reporting rank waits for the others to have read the failure
REPEATS = (ImportError, TypeError, AttributeError, NameError)  # before the first step: the next start meets them too
PARTING_SECONDS = 10.0  # how long rank 0 waits for the others at the end of a good run


@dataclass(frozen=True)
class Failure:
    """Why a run ended early. RUN/failure.json holds these fields."""

    rank: int
    host: str
    step: int | None  # optimizer step under way; None before the first
    reason: str
    exit_code: int = FAILED
    restart_may_help: bool = True
    time: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    def line(self) -> str:
        """Return the last line that the run prints."""
        if self.exit_code == USER_ERROR:
            return f"error: {self.reason}"
        if self.exit_code == INTERRUPTED:
            return self.reason
        at = "" if self.step is None else f" at step {self.step:,}"
        remedy = f"; {RESUME}" if self.restart_may_help else ""
        return f"failed: rank {self.rank} on {self.host}{at}: {self.reason}{remedy}"


def in_one_line(error: BaseException) -> str:
    """Return type and message of an exception, shortened to 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def lost_the_other_end(error: BaseException) -> bool:
    """Return whether an exception looks like a collective that lost its other end."""
    import torch.distributed as dist

    words = ("gloo", "connection closed", "connection reset", "broken pipe", "timed out", "nccl", "socket")
    is_network = isinstance(error, (dist.DistError, ConnectionError))
    return is_network or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


# ------------------------------------------------------------ heartbeats


class MainThread(NamedTuple):
    """What a rank's main thread does and how far it has progressed, as its heartbeat carries it."""

    position: int  # points and collectives passed, in the same order on all ranks
    waits: bool  # in a collective
    where: str  # the last point that had a name
    frame: str  # the innermost line of Python


class Heartbeats:
    """The heartbeats of all ranks as one rank has seen them, by its own clock."""

    def __init__(self, world_size: int):
        now = time.monotonic()
        self._beats = [""] * world_size
        self._changed = [now] * world_size  # when the rank's heartbeat last changed
        self._progressed = now  # when any main thread last progressed
        self._main_threads = [MainThread(-1, False, "start", "")] * world_size

    def read(self, store: "Store") -> None:
        """Take in every rank's newest heartbeat."""
        keys = [f"beat/{rank}" for rank in range(len(self._beats))]
        if not store.check(keys):
            return  # some have not begun
        now = time.monotonic()
        for rank, beat in enumerate(store.multi_get(keys)):
            text = beat.decode()
            if text != self._beats[rank] or text == "done":
                self._beats[rank], self._changed[rank] = text, now
            if text != "done":
                thread = MainThread(*json.loads(text)[1:])
                if thread.position != self._main_threads[rank].position:
                    self._progressed = now
                self._main_threads[rank] = thread

    def silent(self, seconds: float) -> list[int]:
        """Return the ranks without a heartbeat for so long."""
        now = time.monotonic()
        return [rank for rank, changed in enumerate(self._changed) if now - changed > seconds]

    def all_done(self) -> bool:
        """Return whether every rank has finished."""
        return all(beat == "done" for beat in self._beats)

    def seconds_without_progress(self) -> float:
        """Return the seconds since any main thread progressed."""
        return time.monotonic() - self._progressed

    def anyone_waits(self) -> bool:
        """Return whether any rank is in a collective."""
        return any(thread.waits for thread in self._main_threads)

    def hanging(self) -> tuple[int, MainThread] | None:
        """Return the rank that is furthest behind and in no collective, and its main thread; None when all wait."""
        least = min(thread.position for thread in self._main_threads)
        behind = [rank for rank, thread in enumerate(self._main_threads) if thread.position == least]
        idle = [rank for rank in behind if not self._main_threads[rank].waits]
        if not idle and len(behind) == len(self._main_threads):
            return None
        rank = (idle or behind)[0]
        return rank, self._main_threads[rank]


def main_thread_frame() -> tuple[bool, str]:
    """Return whether the main thread waits in a collective, and the innermost line of Python that it is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "nothing"
    name = frame.f_code.co_filename
    # NCCL's collectives return at once; a rank waits for them where it reads a number (common/distributed.py).
    waits = "/torch/distributed/" in name or "/deepspeed/" in name or name == distributed_file()
    return waits, f"{frame.f_code.co_name} ({Path(name).name}:{frame.f_lineno})"


def distributed_file() -> str:
    """Return the path of common/distributed.py, which imports this module."""
    return str(Path(__file__).with_name("distributed.py"))


def collectives_begun() -> int:
    """Count the collectives that this rank has called, DeepSpeed's included; torch counts them for every group."""
    from torch.distributed import distributed_c10d

    total = 0
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            total += group._get_sequence_number_for_group()
    return total


# ------------------------------------------------------------ the watchdog


class Watchdog:
    """One rank's part of the watch. With one rank it only keeps the step and prints: there is nobody to watch.

    Args:
        rank: this rank.
        hosts: the host of every rank.
        connect: opens a new connection to the store with each call; None with one rank.
        timeout: seconds without progress on any rank after which one of them hangs.
        silence: seconds without a heartbeat after which a rank is lost.

    Attributes:
        step: the optimizer step under way, for the report of a failure.
        on_failure: called with the failure before its line is printed.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        connect: "Callable[[], Store] | None" = None,
        timeout: float = 0,
        silence: float = 0,
    ):
        self.rank, self.world_size, self.hosts = rank, len(hosts), hosts
        self.step: int | None = None
        self.on_failure: Callable[[Failure], None] = lambda failure: None
        self._position, self._where = 0, "start"
        self.timeout, self._silence = timeout, silence
        self._interval = max(BEAT_SECONDS, self.world_size / 500)
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._heard = time.monotonic()  # when the store last answered
        self._store: Store | None = None
        self._threads: list[threading.Thread] = []
        if connect is not None:
            self._store, self._beat_store = connect(), connect()  # a blocked call holds its connection
            self._beat(0)
            for target in (self._watch, self._guard):
                self._threads.append(threading.Thread(target=target, name="watchdog", daemon=True))
                self._threads[-1].start()

    def mark_progress(self, where: str | None = None) -> None:
        """Note that the main thread has reached the next point that all ranks reach, in the same order.

        Args:
            where: the point's name. [the last one given]
        """
        self._position += 1
        self._where = where or self._where

    def stop(self) -> None:
        """Report that this rank has finished. Rank 0, which may serve the store, waits for the others."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(DEAD_SECONDS)
        if self._store is None:
            return
        try:
            self._store.set(f"beat/{self.rank}", "done")
            seen, deadline = Heartbeats(self.world_size), time.monotonic() + PARTING_SECONDS
            while self.rank == 0 and not seen.all_done() and time.monotonic() < deadline:
                seen.read(self._store)
                time.sleep(0.02)
        except RuntimeError:
            pass  # the store went first

    # ------------------------------------------------------------ its two threads

    def _beat(self, count: int) -> None:
        waits, frame = main_thread_frame()
        main_thread = MainThread(self._position + collectives_begun(), waits, self._where, frame)
        self._beat_store.set(f"beat/{self.rank}", json.dumps([count, *main_thread]))

    def _watch(self) -> None:
        """Write heartbeats, look for a reported failure, and on rank 0 read the others' heartbeats."""
        seen = Heartbeats(self.world_size)
        count = 0
        while not self._stopped.wait(self._interval):
            count += 1
            try:
                self._beat(count)
                if self._beat_store.check(["failure"]) and not self._ending.locked():
                    self._end_with_reporter(self._beat_store)
                if self.rank == 0:
                    seen.read(self._beat_store)
                    failure = self._find_failure(seen)
                    if failure is not None:
                        self.end(failure, lost=len(seen.silent(self._silence)))
            except RuntimeError:  # the store's server is gone: `_guard` waits a little, then reports it
                return
            self._heard = time.monotonic()

    def _guard(self) -> None:
        """End this rank when the store is gone, or when a cut network leaves `_watch` in a call that never returns."""
        while not self._stopped.wait(self._interval):
            watch_has_ended = not self._threads[0].is_alive() if self._threads else False
            silent = time.monotonic() - self._heard
            if silent > self._silence or (watch_has_ended and silent > DEAD_SECONDS):
                reason = "its process or host is gone" if watch_has_ended else f"no answer for {self._silence:.0f} s"
                self._end_without_store(reason)

    def _find_failure(self, seen: Heartbeats) -> Failure | None:
        """Return the failure of a rank that is lost or hangs, from the heartbeats that rank 0 sees."""
        silent = seen.silent(self._silence)
        if silent:
            reason = f"no heartbeat for {self._silence:.0f} s (its host is cut off, or the process is stopped)"
            return self._failure_of(silent[0], reason)
        waited = format_seconds(self.timeout)
        if seen.seconds_without_progress() < self.timeout or not seen.anyone_waits():
            return None  # ranks that each work by themselves may take as long as they like
        hanging = seen.hanging()
        if hanging is None:
            reason = f"hangs: for {waited} no rank has progressed past {self._where}; all wait for each other"
            return self._failure_of(0, reason)
        rank, thread = hanging
        reason = f"hangs: for {waited} it is at {thread.where}, in {thread.frame}, and the others wait for it"
        return self._failure_of(rank, reason)

    def _failure_of(self, rank: int, reason: str) -> Failure:
        return Failure(rank, self.hosts[rank], self.step, reason)

    # ------------------------------------------------------------ ending

    def end_by(self, error: BaseException) -> int:
        """End the run by an exception that `main` cannot handle, and blame the right rank.

        Does not return with several ranks.

        Returns:
            The exit code.
        """
        failure = self._dead_peer() if lost_the_other_end(error) else None
        if failure is not None:
            return self.end(failure, lost=1)
        failure = self._failure_of(self.rank, in_one_line(error))
        if self.step is None and isinstance(error, REPEATS):
            failure = dataclasses.replace(failure, restart_may_help=False)
        if not (self._store is not None and _is_reported(self._store)):
            traceback.print_exception(error)
        return self.end(failure)

    def end(self, failure: Failure, lost: int = 0) -> int:
        """Print the line unless another rank reported first, tell all ranks, and end this process.

        With one rank the process goes on.

        Args:
            failure: what ends the run.
            lost: how many ranks will never read it.

        Returns:
            The exit code, with one rank.
        """
        if self._store is None:
            self._print(failure)
            return failure.exit_code
        with self._ending:
            try:
                mine = json.dumps(dataclasses.asdict(failure) | {"by": self.rank})
                first = self._store.compare_set("failure", "", mine).decode()
                if first != mine:
                    self._end_with_reporter(self._store)
                self._print(failure)
                self._store.set("told", "")
                self._linger(self._store, lost)
            except RuntimeError:  # the store is gone: rank 0 has been faster
                pass
            _exit(failure.exit_code)

    def wait_for_main(self, exit_code: int) -> int:
        """Wait until rank 0 has reported an error that every rank met, and end then; returns if rank 0 does not.

        Returns:
            `exit_code`.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and not self._stopped.wait(self._interval):
            pass  # `_watch` ends the process when rank 0 has reported
        return exit_code

    def _print(self, failure: Failure) -> None:
        self.on_failure(failure)
        print(failure.line(), file=sys.stderr, flush=True)

    def _end_with_reporter(self, store: "Store") -> NoReturn:
        """Wait until the rank that reported the failure has printed its line, then exit silently."""
        failure = json.loads(store.get("failure"))
        by = failure.pop("by")
        deadline = time.monotonic() + LINGER_SECONDS
        while not store.check(["told"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.rank == 0:
            self.on_failure(Failure(**failure))  # the reporter's host may not see the run folder
        store.add("heard", 1)
        if self.rank == 0 and by != 0:
            self._linger(store)
        _exit(failure["exit_code"])

    def _linger(self, store: "Store", lost: int = 0) -> None:
        """Wait until the other ranks have read the failure: the store ends with rank 0, which may serve it."""
        deadline = time.monotonic() + LINGER_SECONDS
        while store.add("heard", 0) < self.world_size - 1 - lost and time.monotonic() < deadline:
            time.sleep(0.02)

    def _end_without_store(self, reason: str) -> NoReturn:
        """End without rank 0 and its store. The ranks left cannot agree on a reporter: one of each host prints."""
        failure = self._failure_of(0, reason)
        first_here = socket.socket(socket.AF_UNIX)
        try:
            first_here.bind(f"\0ksub {os.environ['MASTER_PORT']}")  # an abstract name: free again when we end
            self._print(failure)
            time.sleep(DEAD_SECONDS)
        except OSError:
            pass  # another rank of this host prints
        _exit(failure.exit_code)

    def _dead_peer(self) -> Failure | None:
        """After a broken collective, return the failure of a rank without heartbeats; end if one was reported."""
        if self._store is None:
            return None
        try:
            seen, deadline = Heartbeats(self.world_size), time.monotonic() + 2 * DEAD_SECONDS
            while time.monotonic() < deadline:
                if _is_reported(self._store):
                    self._end_with_reporter(self._store)
                seen.read(self._store)
                silent = seen.silent(DEAD_SECONDS)
                if silent:
                    reason = "its process has ended without a report (killed, or out of memory)"
                    return self._failure_of(silent[0], reason)
                time.sleep(self._interval)
        except RuntimeError:
            self._end_without_store("its process or host is gone")
        return None


def _is_reported(store: "Store") -> bool:
    """Return whether a rank has reported a failure."""
    return bool(store.check(["failure"]))


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the main thread may be in a collective that never returns


def connector(host: str, port: int, prefix: str, timeout: timedelta) -> "Callable[[], Store]":
    """Return a function that opens new connections to the TCPStore at host:port.

    Args:
        host: where the store runs.
        port: of the store.
        prefix: put before our keys, so that they are ours alone.
        timeout: longest wait for an answer of the store.
    """
    from torch.distributed import PrefixStore, TCPStore

    return lambda: PrefixStore(prefix, TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
