"""Before anything starts: ask every host, and name what is wrong host by host.

Unreachable, other versions, missing or damaged shards and codes, no room in the run folder, more slots than
GPUs, a port that is taken. One round of ssh, all hosts at once.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass

from ksub_ds.cluster.inspection import Answer, Question, versions
from ksub_ds.cluster.remote import SSH_FAILED, Result, python_module, run_on_all

REACHABLE_SECONDS = 20.0
INSPECTION_SECONDS = 600.0  # reading all shards once


@dataclass(frozen=True)
class Readiness:
    """What the hosts say: problems as (host, sentence), and where the ranks meet."""

    problems: list[tuple[str, str]]
    address: str
    port: int
    hostnames: dict[str, str]  # a host's own name -> its name in the hostfile


def reachable(hosts: list[str], ssh_port: str | None) -> dict[str, str]:
    """{host: why not} of the hosts that do not answer."""
    results = run_on_all(hosts, ssh_port, ["true"], timeout=REACHABLE_SECONDS)
    return {host: f"cannot be reached: {result.last_line()}" for host, result in results.items() if result.code != 0}


def preflight(hosts: dict[str, int], question: Question, ssh_port: str | None, meeting_port: int) -> Readiness:
    """Ask all hosts; the first one also where the ranks can meet."""
    names = list(hosts)
    questions = {}
    for host, slots in hosts.items():
        questions[host] = dataclasses.replace(question, slots=slots)
        if host == names[0]:
            peer = names[1] if len(names) > 1 else "localhost"
            questions[host] = dataclasses.replace(questions[host], peer=peer, port=meeting_port)
    texts = {host: json.dumps(asdict(each)) for host, each in questions.items()}
    words = python_module("ksub_ds.cluster.inspection")
    results = run_on_all(hosts, ssh_port, words, texts, INSPECTION_SECONDS)
    problems: list[tuple[str, str]] = []
    answers: dict[str, Answer] = {}
    for host, result in results.items():
        answer = _read(result)
        if isinstance(answer, str):
            problems.append((host, answer))
        else:
            answers[host] = answer
            problems += [(host, problem) for problem in answer.problems]
    problems += _differences(answers)
    first = answers.get(names[0], Answer())
    hostnames = {answer.hostname: host for host, answer in answers.items()}
    return Readiness(problems, first.address, first.port, hostnames)


def _read(result: Result) -> Answer | str:
    if result.code is None:
        return f"gave no answer in {INSPECTION_SECONDS:.0f} s: it hangs, or is too slow in reading all shards once"
    if result.code == SSH_FAILED:
        return f"cannot be reached: {result.last_line()}"
    if result.code == 127 or "No module named" in result.errors or "No such file" in result.errors:
        return f"has no ksub_ds at the same path as here ({result.last_line()}); install the same environment there"
    try:
        return Answer(**json.loads(result.output.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return f"the inspection failed: {result.last_line()}"


def _differences(answers: dict[str, Answer]) -> list[tuple[str, str]]:
    """Against this machine's versions, and against the first host's codes and shards."""
    ours, problems = versions(), []
    for host, answer in answers.items():
        for name, version in ours.items():
            theirs = answer.versions.get(name)
            if theirs != version:
                problems.append((host, f"{name} is {theirs}, here {version}; install the same on all hosts"))
    for name in ("codes", "data"):
        known = {host: getattr(answer, name) for host, answer in answers.items() if getattr(answer, name)}
        for host, value in known.items():
            first_host, first_value = next(iter(known.items()))
            if value != first_value:
                sums = f"sha256 {value[:12]}..., on {first_host} {first_value[:12]}..."
                problems.append((host, f"--{name}: differs ({sums}); copy the same files to all hosts"))
    return problems
