"""Which rank is missing? A thread in every rank that knows, and ends the run with one line instead of a silent hang.

Every rank writes a sign of life several times a second into a store of its own line (torch's TCPStore, served by rank
0 or by the launcher), together with how far its main thread has come. Rank 0 reads them all:

    no sign of life for `silence` seconds      the host is cut off, or the process is stopped
    no rank comes on for `timeout` seconds     the one that hangs is behind the others, and is in no collective

A rank that fails of itself, or whose collective breaks because another has died, says so in the same store. The first
to speak prints the line; every other rank sees it, says nothing, and ends with the same exit code.
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
from typing import Any

from ksub_ds.common.logging import format_seconds

# Merged docstring, to be folded in:
# """Why a run ended before its time: what is written to RUN/failure.json, the line that is printed, the exit code."""

# Merged docstring, to be folded in:
# """The signs of life that ranks leave in the store, as the watchdog of one rank reads them."""


EXIT_USER_ERROR, EXIT_FAILED, EXIT_INTERRUPTED = 2, 70, 130


@dataclass(frozen=True)
class Failure:
    """What ended a run before its time. RUN/failure.json holds these fields."""

    rank: int
    host: str
    step: int | None  # optimizer step under way; None before the first
    reason: str
    exit_code: int = EXIT_FAILED
    restart_may_help: bool = True
    time: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    def line(self) -> str:
        """The last line of the run."""
        if self.exit_code == EXIT_USER_ERROR:
            return f"error: {self.reason}"
        if self.exit_code == EXIT_INTERRUPTED:
            return self.reason
        at = "" if self.step is None else f" at step {self.step:,}"
        return f"failed: rank {self.rank} on {self.host}{at}: {self.reason}; the same command continues"


def in_one_line(error: BaseException) -> str:
    """Type and message of an exception, cut where it is long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def lost_the_other_end(error: BaseException) -> bool:
    """Whether an exception looks like a collective that lost its other end."""
    import torch.distributed as dist

    signs = ("gloo", "connection closed", "connection reset", "broken pipe", "timed out", "nccl", "socket")
    is_network = isinstance(error, (dist.DistError, ConnectionError))
    return is_network or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs))


class Heartbeats:
    """The ranks' signs of life as one rank has seen them, by its own clock."""

    def __init__(self, world_size: int):
        now = time.monotonic()
        self._beats = [""] * world_size
        self._changed = [now] * world_size  # when the rank last gave a sign
        self._moved = now  # when any main thread last came on
        self._places: list[list[Any]] = [[-1, False, "start", ""]] * world_size  # position, waits, where, frame

    def read(self, store: Any) -> None:
        """Take in every rank's newest sign."""
        keys = [f"beat/{rank}" for rank in range(len(self._beats))]
        if not store.check(keys):
            return  # some have not begun
        now = time.monotonic()
        for rank, beat in enumerate(store.multi_get(keys)):
            text = beat.decode()
            if text != self._beats[rank] or text == "done":
                self._beats[rank], self._changed[rank] = text, now
            if text != "done":
                place = json.loads(text)[1:]
                if place[0] != self._places[rank][0]:
                    self._moved = now
                self._places[rank] = place

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have given no sign for so long."""
        now = time.monotonic()
        return [rank for rank, changed in enumerate(self._changed) if now - changed > seconds]

    def all_done(self) -> bool:
        """Whether every rank is through."""
        return all(beat == "done" for beat in self._beats)

    def standing(self) -> float:
        """Seconds since any main thread came on."""
        return time.monotonic() - self._moved

    def anyone_waits(self) -> bool:
        """Whether any rank is in a collective."""
        return any(place[1] for place in self._places)

    def hanging(self) -> tuple[int, str, str] | None:
        """(rank, where, frame) of the one that has come least far and is in no collective; None when all wait."""
        least = min(place[0] for place in self._places)
        behind = [rank for rank, place in enumerate(self._places) if place[0] == least]
        idle = [rank for rank in behind if not self._places[rank][1]]
        if not idle and len(behind) == len(self._places):
            return None
        rank = (idle or behind)[0]
        return rank, self._places[rank][2], self._places[rank][3]


def main_thread_place() -> tuple[bool, str]:
    """Whether the main thread waits in a collective, and the innermost line of Python that it is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "nothing"
    name = frame.f_code.co_filename
    # NCCL's collectives return at once; who waits for them waits where a number is read (common/distributed.py).
    waits = "/torch/distributed/" in name or "/deepspeed/" in name or name == distributed_file()
    return waits, f"{frame.f_code.co_name} ({Path(name).name}:{frame.f_lineno})"


def distributed_file() -> str:
    """The file of common/distributed.py, which imports this one."""
    return str(Path(__file__).with_name("distributed.py"))


def collectives_begun() -> int:
    """How many collectives this rank has called, DeepSpeed's among them; torch counts them for every group."""
    from torch.distributed import distributed_c10d

    total = 0
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            total += group._get_sequence_number_for_group()
    return total


BEAT_SECONDS = 0.25  # between two signs of life; more in runs of more than 125 ranks
DEAD_SECONDS = 1.5  # a rank whose collective broke takes peers for dead that are silent this long
LINGER_SECONDS = 3.0  # how long the rank that speaks waits for the others to have heard
PARTING_SECONDS = 10.0  # how long rank 0 waits for the others at the end of a good run


class Watchdog:
    """One rank's part. With one rank it only keeps the step and prints; there is nobody to watch.

    Args:
        hosts: the host of every rank.
        connect: opens a connection to the store, a new one with each call; None with one rank.
        timeout: seconds after which a main thread that stands still hangs.
        silence: seconds after which a rank without a sign of life is lost.
    """

    def __init__(
        self,
        rank: int,
        hosts: list[str],
        connect: Callable[[], Any] | None = None,
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
        self._store: Any = None
        self._threads: list[threading.Thread] = []
        if connect is not None:
            self._store, self._line = connect(), connect()  # a blocked call holds its connection
            self._beat(0)
            for target in (self._watch, self._guard):
                self._threads.append(threading.Thread(target=target, name="watchdog", daemon=True))
                self._threads[-1].start()

    def mark_progress(self, where: str | None = None) -> None:
        """The main thread has come to the next point that all ranks come to, in the same order."""
        self._position += 1
        self._where = where or self._where

    def stop(self) -> None:
        """This rank is through. Rank 0, who may serve the store, waits for the others."""
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
            pass  # the store has gone before us

    # ------------------------------------------------------------ the two threads

    def _beat(self, count: int) -> None:
        waits, frame = main_thread_place()
        position = self._position + collectives_begun()
        self._line.set(f"beat/{self.rank}", json.dumps([count, position, waits, self._where, frame]))

    def _watch(self) -> None:
        """Give signs of life, look for a failure, and on rank 0 look at the others' signs."""
        seen = Heartbeats(self.world_size)
        count = 0
        while not self._stopped.wait(self._interval):
            count += 1
            try:
                self._beat(count)
                if self._line.check(["failure"]) and not self._ending.locked():
                    self._obey(self._line)
                if self.rank == 0:
                    seen.read(self._line)
                    failure = self._judge(seen)
                    if failure is not None:
                        self.end(failure, lost=len(seen.silent(self._silence)))
            except RuntimeError:  # the store's server is gone: `_guard` waits a little, then says so
                return
            self._heard = time.monotonic()

    def _guard(self) -> None:
        """Without rank 0 there is no store; a cut network leaves `_watch` in a call that never returns."""
        while not self._stopped.wait(self._interval):
            line_is_dead = not self._threads[0].is_alive() if self._threads else False
            silent = time.monotonic() - self._heard
            if silent > self._silence or (line_is_dead and silent > DEAD_SECONDS):
                how = "its process or host is gone" if line_is_dead else f"no answer for {self._silence:.0f} s"
                self._end_alone(how)

    def _judge(self, seen: "Heartbeats") -> Failure | None:
        """A rank that is lost or hangs, from the signs of life that rank 0 sees."""
        silent = seen.silent(self._silence)
        if silent:
            reason = f"no sign of life for {self._silence:.0f} s (its host is cut off, or the process is stopped)"
            return self._about(silent[0], reason)
        waited = format_seconds(self.timeout)
        if seen.standing() < self.timeout or not seen.anyone_waits():
            return None  # ranks that work each for itself may take as long as they like
        hanging = seen.hanging()
        if hanging is None:
            return self._about(
                0, f"hangs: for {waited} no rank has come on from {self._where}, all wait for each other"
            )
        rank, where, frame = hanging
        return self._about(rank, f"hangs: for {waited} it is at {where}, in {frame}, and the others wait for it")

    def _about(self, rank: int, reason: str) -> Failure:
        return Failure(rank, self.hosts[rank], self.step, reason)

    # ------------------------------------------------------------ ending

    def end_by(self, error: BaseException) -> int:
        """What `main` calls for an exception it cannot handle: say who is to blame. Does not return with several ranks.

        Returns:
            The exit code.
        """
        failure = self._dead_peer() if lost_the_other_end(error) else None
        if failure is not None:
            return self.end(failure, lost=1)
        failure = self._about(self.rank, in_one_line(error))
        if not (self._store is not None and self._failure_is_known()):
            traceback.print_exception(error)
        return self.end(failure)

    def end(self, failure: Failure, lost: int = 0) -> int:
        """Print the line unless another rank was first, tell all ranks, and end this process with the exit code.

        With one rank the process goes on, with the exit code as result.

        Args:
            lost: how many ranks will never hear of it.
        """
        if self._store is None:
            self._tell(failure)
            return failure.exit_code
        with self._ending:
            try:
                mine = json.dumps(dataclasses.asdict(failure) | {"by": self.rank})
                first = self._store.compare_set("failure", "", mine).decode()
                if first != mine:
                    self._obey(self._store)
                self._tell(failure)
                self._store.set("told", "")
                self._linger(lost)
            except RuntimeError:  # the store is gone: rank 0 has been faster
                pass
            self._exit(failure.exit_code)
        raise AssertionError("unreachable")

    def wait_for_main(self, exit_code: int) -> int:
        """An error that every rank has met alike and rank 0 tells: end when it has. Returns where rank 0 is alone."""
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and not self._stopped.wait(self._interval):
            pass  # `_watch` ends the process when rank 0 has spoken
        return exit_code

    def _tell(self, failure: Failure) -> None:
        self.on_failure(failure)
        print(failure.line(), file=sys.stderr, flush=True)

    def _obey(self, store: Any) -> None:
        """Another rank has said why the run ends: end as well, after its line is out, without a word."""
        failure = json.loads(store.get("failure"))
        by = failure.pop("by")
        deadline = time.monotonic() + LINGER_SECONDS
        while not store.check(["told"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.rank == 0:
            self.on_failure(Failure(**failure))  # its own host may not see the run folder
        store.add("heard", 1)
        if self.rank == 0 and by != 0:
            self._linger()
        self._exit(failure["exit_code"])

    def _linger(self, lost: int = 0) -> None:
        """Rank 0 may serve the store: the others must have read it before it goes."""
        deadline = time.monotonic() + LINGER_SECONDS
        while self._store.add("heard", 0) < self.world_size - 1 - lost and time.monotonic() < deadline:
            time.sleep(0.02)

    def _end_alone(self, reason: str) -> None:
        """End without rank 0 and its store. The ranks left cannot agree on who speaks: one of each host does."""
        failure = self._about(0, reason)
        first_here = socket.socket(socket.AF_UNIX)
        try:
            first_here.bind(f"\0ksub {os.environ['MASTER_PORT']}")  # an abstract name: free again when we end
            self._tell(failure)
            time.sleep(DEAD_SECONDS)
        except OSError:
            pass  # another rank of this host speaks
        self._exit(failure.exit_code)

    def _dead_peer(self) -> Failure | None:
        """After a broken collective: another rank's own word, or else a rank that gives no more signs of life."""
        if self._store is None:
            return None
        try:
            seen, deadline = Heartbeats(self.world_size), time.monotonic() + 2 * DEAD_SECONDS
            while time.monotonic() < deadline:
                if self._failure_is_known():
                    self._obey(self._store)
                seen.read(self._store)
                silent = seen.silent(DEAD_SECONDS)
                if silent:
                    return self._about(silent[0], "its process has ended without a word (killed, or out of memory)")
                time.sleep(self._interval)
        except RuntimeError:
            self._end_alone("its process or host is gone")
        return None

    def _failure_is_known(self) -> bool:
        return bool(self._store.check(["failure"]))

    def _exit(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may be in a collective that never returns


def connector(host: str, port: int, prefix: str, timeout: timedelta) -> Callable[[], Any]:
    """Opens new connections to the TCPStore at host:port, under a prefix of our own."""
    from torch.distributed import PrefixStore, TCPStore

    return lambda: PrefixStore(prefix, TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
