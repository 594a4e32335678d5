"""What the outcome of an attempt means: its exit code, and the one line that names host and rank."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.cluster.attempt import AttemptOutcome, describe_exit
from ksub_ds.common.exit_codes import DONE, FAILED, REQUEUE, USER_ERROR, exit_code_of_signal

# Signals that come from outside or from a crash. SIGTERM is what launchers send to the other ranks, and SIGABRT what
# torch sends itself when another rank is gone: neither is the cause.
FATAL = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


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
