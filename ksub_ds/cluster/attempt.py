"""One start of all ranks, watched to its end.

Every rank's guardian sends marked lines (ksub_ds/cluster/worker.py); from them this knows who runs, who ended
how, and who has fallen silent. At the first bad sign the other ranks get a moment to end by themselves and
to say why; then the launcher is killed, and with it, by their lifelines, all guardians and workers.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ksub_ds.cluster.launch_spec import LAUNCH_ID
from ksub_ds.cluster.launchers import Start
from ksub_ds.cluster.remote import SSH_FAILED

GRACE_SECONDS = 20.0  # from the first bad sign to the end of the launcher
SILENCE_SECONDS = 60.0  # guardians speak every 5 s; after this their host is lost
STOP_SECONDS = 60.0  # from STOP to the end of the launcher, when a signal asked for it
MARKED = re.compile(r"ksub\|([^|]*)\|(\d+)\|(start|line|alive|end)\|(.*)$")
PDSH_ENDED = re.compile(r"pdsh@\S+: (\S+): \S+ exited with exit code (\d+)")
# Killed with its pipe: no launcher survives whoever started it. `kill 0` means this process group.
DEAD_MANS_SWITCH = ["sh", "-c", "trap '' INT TERM HUP; read -r _; kill -KILL 0"]


@dataclass
class Rank:
    """What is known of one rank."""

    host: str
    heard: float  # time.monotonic() of its last line
    code: int | None = None  # exit code, or minus the signal
    order: int = 0  # ended as the n-th


@dataclass
class Outcome:
    """How an attempt ended."""

    ranks: dict[int, Rank] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # host -> why
    gone: dict[str, int] = field(default_factory=dict)  # host -> how its launcher ended, before all its ranks had
    launcher_codes: list[int] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)  # "error: ..." and "failed: ..." lines of ranks
    noise: list[str] = field(default_factory=list)  # what launchers said

    def bad(self) -> bool:
        """Whether something went wrong already."""
        ended = [rank.code for rank in self.ranks.values() if rank.code is not None]
        return bool(self.lost or self.gone) or any(ended)


class HostLogs:
    """RUN/logs/<host>.log: everything that came from a host, with time and rank; launcher.log: the rest.

    The folder is made with the first line: a start that is refused leaves none.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._streams = folder, {}  # type: ignore[var-annotated]

    def write(self, host: str, text: str) -> None:
        """Append a line; a disk that is full loses it, no more."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            if host not in self._streams:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._streams[host] = (self._folder / f"{host}.log").open("a", encoding="utf-8")
            self._streams[host].write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._streams[host].flush()

    def close(self) -> None:
        """Close all."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()


class Attempt:
    """Starts processes, listens, and ends them all.

    Args:
        starts: the launcher's processes.
        environment, folder: theirs; the environment carries the launch id.
        logs: where lines go.
        hostnames: a host's own name -> its name in the hostfile.
        stop: called once with the signal that asks this program to stop; asks the ranks to.
    """

    def __init__(
        self,
        starts: list[Start],
        environment: dict[str, str],
        folder: Path,
        logs: HostLogs,
        hostnames: dict[str, str],
        stop: Callable[[int], None],
        screen: TextIO = sys.stderr,
    ):
        assert LAUNCH_ID in environment
        self._starts, self._environment, self._folder = starts, environment, folder
        self._logs, self._hostnames, self._ask_to_stop, self._screen = logs, hostnames, stop, screen
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.outcome = Outcome()
        self.signals: list[int] = []  # that asked this program to stop

    def run(self) -> Outcome:
        """Start, watch, end."""
        switch = subprocess.Popen(DEAD_MANS_SWITCH, stdin=subprocess.PIPE, process_group=0)
        processes: list[subprocess.Popen[str]] = []
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note)
        try:
            for number, start in enumerate(self._starts):
                processes.append(
                    subprocess.Popen(
                        start.command,
                        env=self._environment,
                        cwd=self._folder,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors="replace",
                        process_group=switch.pid,
                    )
                )
                threading.Thread(target=self._read, args=(number, processes[-1]), daemon=True).start()
            self._watch(processes)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(switch.pid, signal.SIGKILL)
            switch.wait()
            self.outcome.launcher_codes = [process.wait() for process in processes]
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcome

    def _note(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def _read(self, number: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put((number, line.rstrip("\n")))
        self._lines.put((number, None))

    def _watch(self, processes: "list[subprocess.Popen[str]]") -> None:
        """Until all launchers have ended, or what is left of them has to be ended."""
        running, deadline, signals_seen = set(range(len(processes))), None, 0
        while running and (deadline is None or time.monotonic() < deadline):
            with contextlib.suppress(queue.Empty):
                number, line = self._lines.get(timeout=0.5)
                if line is None:
                    running.discard(number)
                    self._ended_launcher(self._starts[number].host, processes[number].wait())
                else:
                    self._hear(line)
                if not self._lines.empty():
                    continue
            self._notice_silence()
            # A launcher that was killed leaves its children, which hold its pipe: no end of file tells.
            died = any(processes[number].poll() is not None for number in running)
            if deadline is None and (died or self.outcome.bad()):
                deadline = time.monotonic() + GRACE_SECONDS
            if len(self.signals) > signals_seen:
                signals_seen = len(self.signals)
                if signals_seen > 1:
                    return
                deadline = time.monotonic() + STOP_SECONDS
                self._ask_to_stop(self.signals[0])

    def _hear(self, line: str) -> None:
        found = MARKED.search(line)
        if not found:
            self._hear_launcher(line)
            return
        host, number, kind, text = self._hostnames.get(found[1], found[1]), int(found[2]), found[3], found[4]
        rank = self.outcome.ranks.setdefault(number, Rank(host, 0.0))
        rank.heard = time.monotonic()
        if kind == "line":
            self._logs.write(host, f"rank {number}: {text}")
            if text.startswith(("error: ", "failed: ")):
                self.outcome.verdicts.append(text)  # printed last
            else:
                self._print(text if number == 0 else f"{host} rank {number}: {text}")
        elif kind == "end":
            rank.code = int(text)
            rank.order = sum(each.code is not None for each in self.outcome.ranks.values())
            self._logs.write(host, f"rank {number} ended: {describe(rank.code)}")
        elif kind == "start":
            self._logs.write(host, f"rank {number} started as process {text}")

    def _hear_launcher(self, line: str) -> None:
        self._logs.write("launcher", line)
        self.outcome.noise.append(line)
        found = PDSH_ENDED.search(line)
        if found:
            self._ended_launcher(found[1], int(found[2]))

    def _ended_launcher(self, host: str | None, code: int) -> None:
        """What started the ranks of one host has ended; with ranks of that host still running, something is wrong."""
        theirs = [rank for rank in self.outcome.ranks.values() if rank.host == host]
        if host is None or code == 0 or (theirs and all(rank.code is not None for rank in theirs)):
            return
        if code == SSH_FAILED:
            self.outcome.lost.setdefault(host, "its connection broke")
        else:  # a guardian was killed, or could not start
            self.outcome.gone.setdefault(host, code)

    def _notice_silence(self) -> None:
        now = time.monotonic()
        for rank in self.outcome.ranks.values():
            if rank.code is None and now - rank.heard > SILENCE_SECONDS:
                self.outcome.lost.setdefault(rank.host, f"it has been silent for {SILENCE_SECONDS:.0f} s")

    def _print(self, text: str) -> None:
        print(text, file=self._screen, flush=True)


def describe(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed by signal {-code}"
