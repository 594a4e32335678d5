"""Check every host before anything starts, and name what is wrong host by host.

Unreachable, other versions, missing or damaged shards and codes, no space in the run folder, more slots than
GPUs, a port that is taken. One round of ssh, all hosts at once.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass

from ksub_ds.cluster.host_check import HostCheck, HostReport, versions
from ksub_ds.cluster.remote import SSH_FAILED, CommandResult, python_module, run_on_all

REACHABLE_SECONDS = 20.0
INSPECTION_SECONDS = 600.0  # reading all shards once


@dataclass(frozen=True)
class Readiness:
    """The result of a preflight: problems as (host, sentence), and where the ranks meet."""

    problems: list[tuple[str, str]]
    address: str
    port: int
    hostnames: dict[str, str]  # a host's own name -> its name in the hostfile


def unreachable(hosts: list[str], ssh_port: str | None) -> dict[str, str]:
    """Return the hosts that do not answer, each with the reason."""
    results = run_on_all(hosts, ssh_port, ["true"], timeout=REACHABLE_SECONDS)
    return {host: f"cannot be reached: {result.last_line()}" for host, result in results.items() if result.code != 0}


def preflight(hosts: dict[str, int], check: HostCheck, ssh_port: str | None, rendezvous_port: int) -> Readiness:
    """Check all hosts, and find on the first one where the ranks can meet.

    Args:
        hosts: {host: slots}.
        check: what to check on every host.
        ssh_port: ssh's port, if not the default.
        rendezvous_port: the port that must be free on the first host; 0: find one.
    """
    names = list(hosts)
    checks = {}
    for host, slots in hosts.items():
        checks[host] = dataclasses.replace(check, slots=slots)
        if host == names[0]:
            peer = names[1] if len(names) > 1 else "localhost"
            checks[host] = dataclasses.replace(checks[host], peer=peer, port=rendezvous_port)
    texts = {host: json.dumps(asdict(each)) for host, each in checks.items()}
    words = python_module("ksub_ds.cluster.host_check")
    results = run_on_all(hosts, ssh_port, words, texts, INSPECTION_SECONDS)
    problems: list[tuple[str, str]] = []
    reports: dict[str, HostReport] = {}
    for host, result in results.items():
        report = _read(result)
        if isinstance(report, str):
            problems.append((host, report))
        else:
            reports[host] = report
            problems += [(host, problem) for problem in report.problems]
    problems += _differences(reports)
    first = reports.get(names[0], HostReport())
    hostnames = {report.hostname: host for host, report in reports.items()}
    return Readiness(problems, first.address, first.port, hostnames)


def _read(result: CommandResult) -> HostReport | str:
    """Return the report that a host printed, or why there is none."""
    if result.code is None:
        return f"gave no answer in {INSPECTION_SECONDS:.0f} s: it hangs, or is too slow in reading all shards once"
    if result.code == SSH_FAILED:
        return f"cannot be reached: {result.last_line()}"
    if result.code == 127 or "No module named" in result.errors or "No such file" in result.errors:
        return f"has no ksub_ds at the same path as here ({result.last_line()}); install the same environment there"
    try:
        return HostReport(**json.loads(result.output.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return f"the inspection failed: {result.last_line()}"


def _differences(reports: dict[str, HostReport]) -> list[tuple[str, str]]:
    """Compare versions with this machine's, codes and shards with the first host's."""
    ours, problems = versions(), []
    for host, report in reports.items():
        for name, version in ours.items():
            theirs = report.versions.get(name)
            if theirs != version:
                problems.append((host, f"{name} is {theirs}, here {version}; install the same on all hosts"))
    for name in ("codes", "data"):
        known = {host: getattr(report, name) for host, report in reports.items() if getattr(report, name)}
        for host, value in known.items():
            first_host, first_value = next(iter(known.items()))
            if value != first_value:
                sums = f"sha256 {value[:12]}..., on {first_host} {first_value[:12]}..."
                problems.append((host, f"--{name}: differs ({sums}); copy the same files to all hosts"))
    return problems
