"""What an attempt's outcome means: its exit code, and the one line that names host and rank."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.cluster.attempt import Outcome, describe

DONE, USER_ERROR, FAILED, REQUEUE = 0, 2, 70, 75  # as python -m ksub_ds.pretrain
# Signals that come from outside or from a crash. SIGTERM is what launchers send to the ranks beside, and SIGABRT what
# torch does to itself when another rank is gone: neither is the cause.
FATAL = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


@dataclass(frozen=True)
class Verdict:
    """`line` is empty where there is nothing to say."""

    code: int
    line: str
    restart_may_help: bool


def judge(outcome: Outcome, failure_file: Path, stopped_by: int | None) -> Verdict:
    """The exit code of an attempt and its last line.

    Args:
        failure_file: RUN/failure.json, as the ranks left it.
        stopped_by: the signal that asked this program to stop, if one did.
    """
    codes = [rank.code for rank in outcome.ranks.values()]
    spoken = outcome.verdicts[-1] if outcome.verdicts else ""
    if stopped_by is not None:
        code = REQUEUE if stopped_by == signal.SIGUSR1 else 128 + stopped_by
        return Verdict(code, "" if codes and not any(codes) else spoken, False)
    if codes and all(code == DONE for code in codes):
        return Verdict(DONE, "", False)
    if REQUEUE in codes and set(codes) <= {DONE, REQUEUE}:
        return Verdict(REQUEUE, "", False)
    killed = _killed(outcome)
    if killed or outcome.lost:
        return Verdict(FAILED, f"failed: {'; '.join([*_lost(outcome), *killed])}", True)
    record = _read(failure_file)
    if USER_ERROR in codes or record.get("exit_code") == USER_ERROR:
        return Verdict(USER_ERROR, spoken or _of_record(record, "error") or _first_end(outcome, "error"), False)
    if not outcome.ranks:
        return Verdict(FAILED, f"failed: no rank started; the launcher ended with {_launcher(outcome)}", False)
    for host, code in outcome.gone.items():
        numbers = [str(number) for number, rank in outcome.ranks.items() if rank.host == host and rank.code is None]
        who = f"rank {', '.join(numbers)} on {host} is gone" if numbers else f"no rank started on {host}"
        return Verdict(FAILED, f"failed: {who}: DeepSpeed's launcher there ended with {describe(code)}", True)
    return Verdict(FAILED, spoken or _of_record(record, "failed") or _first_end(outcome, "failed"), True)


def _killed(outcome: Outcome) -> list[str]:
    """The first rank that a signal killed, in words."""
    ended = sorted((rank.order, number) for number, rank in outcome.ranks.items() if rank.code in FATAL)
    return [
        f"rank {number} on {outcome.ranks[number].host} was {describe(outcome.ranks[number].code or 0)}"
        for _, number in ended[:1]
    ]


def _lost(outcome: Outcome) -> list[str]:
    found = []
    for host, why in outcome.lost.items():
        numbers = [str(number) for number, rank in sorted(outcome.ranks.items()) if rank.host == host]
        ranks = f" (rank {', '.join(numbers)})" if numbers else ""
        found.append(f"host {host}{ranks} is lost: {why}")
    return found


def _first_end(outcome: Outcome, word: str) -> str:
    """Without a word from any rank: the first that did not end well."""
    ended = sorted((rank.order, number) for number, rank in outcome.ranks.items() if rank.code)
    if ended:
        rank = outcome.ranks[ended[0][1]]
        return f"{word}: rank {ended[0][1]} on {rank.host} ended first: {describe(rank.code or 0)}"
    left = [f"{number} on {rank.host}" for number, rank in sorted(outcome.ranks.items()) if rank.code is None]
    return f"{word}: the launcher ended with {_launcher(outcome)}, and with it rank {', '.join(left)}"


def _launcher(outcome: Outcome) -> str:
    return ", ".join(sorted({describe(code) for code in outcome.launcher_codes}))


def _read(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _of_record(record: dict[str, object], word: str) -> str:
    if not {"rank", "host", "reason"} <= record.keys():
        return ""
    return f"{word}: rank {record['rank']} on {record['host']} at step {record.get('step')}: {record['reason']}"
