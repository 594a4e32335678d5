"""One start of all ranks, watched to its end, and what that end means: an exit code, and whether a restart may help.

The supervisor of every rank sends tagged lines (ksub_ds/cluster/supervisor.py), which show the ranks that run, how the
others ended, and which are silent. After the first failure the other ranks get a moment to end by themselves and
to report why; then the launcher is killed, and with it, by their lifelines, all supervisors and workers.
"""

import contextlib
import json
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
from ksub_ds.cluster.launchers import LaunchCommand
from ksub_ds.cluster.remote import SSH_FAILED
from ksub_ds.common.exit_codes import DONE, FAILED, REQUEUE, USER_ERROR, exit_code_of_signal

GRACE_SECONDS = 20.0  # from the first failure to the end of the launcher
SILENCE_SECONDS = 60.0  # supervisors report every 5 s; after this their host is lost
STOP_SECONDS = 60.0  # from STOP to the end of the launcher, when a signal asked for it
TAGGED = re.compile(r"ksub\|([^|]*)\|(\d+)\|(start|line|alive|end)\|(.*)$")
PDSH_ENDED = re.compile(r"pdsh@\S+: (\S+): \S+ exited with exit code (\d+)")
# Ends with its pipe: no launcher survives the program that started it. `kill 0` means this process group.
DEAD_MANS_SWITCH = ["sh", "-c", "trap '' INT TERM HUP; read -r _; kill -KILL 0"]
# Signals that come from outside or from a crash. SIGTERM is what launchers send to the other ranks, and SIGABRT what
# torch sends itself when another rank is gone: neither is the cause.
FATAL = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


@dataclass
class RankStatus:
    """What is known of one rank."""

    host: str
    last_line_at: float  # time.monotonic()
    code: int | None = None  # exit code, or minus the signal; None while it runs
    order: int = 0  # 1 for the first rank that ended


@dataclass
class AttemptOutcome:
    """How an attempt ended."""

    ranks: dict[int, RankStatus] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # host -> why
    launcher_failed: dict[str, int] = field(default_factory=dict)  # host -> exit code; its ranks were still running
    launcher_codes: list[int] = field(default_factory=list)
    failure_lines: list[str] = field(default_factory=list)  # "error: ..." and "failed: ..." lines of ranks
    launcher_output: list[str] = field(default_factory=list)

    def has_failure(self) -> bool:
        """Return whether something has failed already."""
        ended = [rank.code for rank in self.ranks.values() if rank.code is not None]
        return bool(self.lost or self.launcher_failed) or any(ended)


class HostLogs:
    """RUN/logs/<host>.log: everything that came from a host, with time and rank; launcher.log: the rest.

    The folder is made with the first line: a start that is refused leaves none.

    Args:
        folder: RUN/logs; None keeps no logs.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._streams: dict[str, TextIO] = {}

    def write(self, host: str, text: str) -> None:
        """Append a line to a host's log; a full disk loses the line, nothing else."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            if host not in self._streams:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._streams[host] = (self._folder / f"{host}.log").open("a", encoding="utf-8")
            self._streams[host].write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._streams[host].flush()

    def close(self) -> None:
        """Close all logs."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()


class Attempt:
    """Starts the launcher's processes, reads their output, and ends them all.

    Args:
        commands: the launcher's processes.
        environment: their environment, which carries the launch id.
        folder: their working folder.
        logs: where lines go.
        hostnames: a host's own name -> its name in the hostfile.
        stop: called once with the signal that asks this program to stop; asks the ranks to.
        screen: where the ranks' lines are printed.

    Attributes:
        outcome: what is known so far.
        signals: those that asked this program to stop.
    """

    def __init__(
        self,
        commands: list[LaunchCommand],
        environment: dict[str, str],
        folder: Path,
        logs: HostLogs,
        hostnames: dict[str, str],
        stop: Callable[[int], None],
        screen: TextIO = sys.stderr,
    ):
        assert LAUNCH_ID in environment
        self._commands, self._environment, self._folder = commands, environment, folder
        self._logs, self._hostnames, self._ask_to_stop, self._screen = logs, hostnames, stop, screen
        self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.outcome = AttemptOutcome()
        self.signals: list[int] = []

    def run(self) -> AttemptOutcome:
        """Start the processes, watch them to their end, and return how they ended."""
        switch = subprocess.Popen(DEAD_MANS_SWITCH, stdin=subprocess.PIPE, process_group=0)
        processes: list[subprocess.Popen[str]] = []
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_signal)
        try:
            for number, command in enumerate(self._commands):
                processes.append(
                    subprocess.Popen(
                        command.words,
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

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def _read(self, number: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put((number, line.rstrip("\n")))
        self._lines.put((number, None))

    def _watch(self, processes: "list[subprocess.Popen[str]]") -> None:
        """Handle lines until all launchers have ended, or until the rest of them has to be killed."""
        running, deadline, signals_seen = set(range(len(processes))), None, 0
        while running and (deadline is None or time.monotonic() < deadline):
            with contextlib.suppress(queue.Empty):
                number, line = self._lines.get(timeout=0.5)
                if line is None:
                    running.discard(number)
                    self._note_launcher_end(self._commands[number].host, processes[number].wait())
                else:
                    self._handle(line)
                if not self._lines.empty():
                    continue
            self._notice_silence()
            # A killed launcher leaves children that hold its pipe open: there is no end of file.
            died = any(processes[number].poll() is not None for number in running)
            if deadline is None and (died or self.outcome.has_failure()):
                deadline = time.monotonic() + GRACE_SECONDS
            if len(self.signals) > signals_seen:
                signals_seen = len(self.signals)
                if signals_seen > 1:
                    return
                deadline = time.monotonic() + STOP_SECONDS
                self._ask_to_stop(self.signals[0])

    def _handle(self, line: str) -> None:
        found = TAGGED.search(line)
        if not found:
            self._handle_launcher_line(line)
            return
        host, number, kind, text = self._hostnames.get(found[1], found[1]), int(found[2]), found[3], found[4]
        rank = self.outcome.ranks.setdefault(number, RankStatus(host, 0.0))
        rank.last_line_at = time.monotonic()
        if kind == "line":
            self._logs.write(host, f"rank {number}: {text}")
            if text.startswith(("error: ", "failed: ")):
                self.outcome.failure_lines.append(text)  # printed last
            else:
                self._print(text if number == 0 else f"{host} rank {number}: {text}")
        elif kind == "end":
            rank.code = int(text)
            rank.order = sum(each.code is not None for each in self.outcome.ranks.values())
            self._logs.write(host, f"rank {number} ended: {describe_exit(rank.code)}")
        elif kind == "start":
            self._logs.write(host, f"rank {number} started as process {text}")

    def _handle_launcher_line(self, line: str) -> None:
        self._logs.write("launcher", line)
        self.outcome.launcher_output.append(line)
        found = PDSH_ENDED.search(line)
        if found:
            self._note_launcher_end(found[1], int(found[2]))

    def _note_launcher_end(self, host: str | None, code: int) -> None:
        """Note that the process that started a host's ranks has ended, which is a failure if any still run."""
        theirs = [rank for rank in self.outcome.ranks.values() if rank.host == host]
        if host is None or code == 0 or (theirs and all(rank.code is not None for rank in theirs)):
            return
        if code == SSH_FAILED:
            self.outcome.lost.setdefault(host, "its connection broke")
        else:  # a supervisor was killed, or could not start
            self.outcome.launcher_failed.setdefault(host, code)

    def _notice_silence(self) -> None:
        now = time.monotonic()
        for rank in self.outcome.ranks.values():
            if rank.code is None and now - rank.last_line_at > SILENCE_SECONDS:
                self.outcome.lost.setdefault(rank.host, f"it has been silent for {SILENCE_SECONDS:.0f} s")

    def _print(self, text: str) -> None:
        print(text, file=self._screen, flush=True)


def describe_exit(code: int) -> str:
    """Return an exit code, or minus a signal, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed by signal {-code}"


@dataclass(frozen=True)
class ExitStatus:
    """How the launcher ends after an attempt, if it does not restart."""

    code: int
    line: str  # the last line; empty if there is nothing to report
    restart_may_help: bool


def classify_exit(outcome: AttemptOutcome, failure_file: Path, stopped_by: int | None) -> ExitStatus:
    """Find the exit code of an attempt and its last line.

    Args:
        outcome: how ranks, hosts and launchers ended.
        failure_file: RUN/failure.json, as the ranks left it.
        stopped_by: the signal that asked the launcher to stop, if one did.

    Returns:
        The status, the causes that explain the others first: a signal to the launcher, a killed rank or lost
        host, then what the ranks reported.
    """
    codes = [rank.code for rank in outcome.ranks.values()]
    reported = outcome.failure_lines[-1] if outcome.failure_lines else ""
    if stopped_by is not None:
        code = REQUEUE if stopped_by == signal.SIGUSR1 else exit_code_of_signal(stopped_by)
        return ExitStatus(code, "" if codes and not any(codes) else reported, False)
    if codes and all(code == DONE for code in codes):
        return ExitStatus(DONE, "", False)
    if REQUEUE in codes and set(codes) <= {DONE, REQUEUE}:
        return ExitStatus(REQUEUE, "", False)
    killed = _killed(outcome)
    if killed or outcome.lost:
        return ExitStatus(FAILED, f"failed: {'; '.join([*_lost(outcome), *killed])}", True)
    record = _read_record(failure_file)
    if USER_ERROR in codes or record.get("exit_code") == USER_ERROR:
        line = reported or _line_of_record(record, "error") or _first_to_end(outcome, "error")
        return ExitStatus(USER_ERROR, line, False)
    if not outcome.ranks:
        line = f"failed: no rank started; the launcher ended with {_launcher_codes(outcome)}"
        return ExitStatus(FAILED, line, False)
    for host, code in outcome.launcher_failed.items():
        numbers = [str(number) for number, rank in outcome.ranks.items() if rank.host == host and rank.code is None]
        what = f"rank {', '.join(numbers)} on {host} is gone" if numbers else f"no rank started on {host}"
        line = f"failed: {what}: DeepSpeed's launcher there ended with {describe_exit(code)}"
        return ExitStatus(FAILED, line, True)
    line = reported or _line_of_record(record, "failed") or _first_to_end(outcome, "failed")
    return ExitStatus(FAILED, line, record.get("restart_may_help") is not False)


def _killed(outcome: AttemptOutcome) -> list[str]:
    """Describe the first rank that a signal killed."""
    ended = sorted((rank.order, number) for number, rank in outcome.ranks.items() if rank.code in FATAL)
    return [
        f"rank {number} on {outcome.ranks[number].host} was {describe_exit(outcome.ranks[number].code or 0)}"
        for _, number in ended[:1]
    ]


def _lost(outcome: AttemptOutcome) -> list[str]:
    """Describe every host that was lost, with its ranks."""
    found = []
    for host, why in outcome.lost.items():
        numbers = [str(number) for number, rank in sorted(outcome.ranks.items()) if rank.host == host]
        ranks = f" (rank {', '.join(numbers)})" if numbers else ""
        found.append(f"host {host}{ranks} is lost: {why}")
    return found


def _first_to_end(outcome: AttemptOutcome, word: str) -> str:
    """Return a line for ranks that reported nothing: the first one that did not end well."""
    ended = sorted((rank.order, number) for number, rank in outcome.ranks.items() if rank.code)
    if ended:
        rank = outcome.ranks[ended[0][1]]
        return f"{word}: rank {ended[0][1]} on {rank.host} ended first: {describe_exit(rank.code or 0)}"
    left = [f"{number} on {rank.host}" for number, rank in sorted(outcome.ranks.items()) if rank.code is None]
    return f"{word}: the launcher ended with {_launcher_codes(outcome)}, and with it rank {', '.join(left)}"


def _launcher_codes(outcome: AttemptOutcome) -> str:
    return ", ".join(sorted({describe_exit(code) for code in outcome.launcher_codes}))


def _read_record(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _line_of_record(record: dict[str, object], word: str) -> str:
    if not {"rank", "host", "reason"} <= record.keys():
        return ""
    return f"{word}: rank {record['rank']} on {record['host']} at step {record.get('step')}: {record['reason']}"
