"""Check every host before anything starts, and name what is wrong host by host.

Unreachable, other versions, missing or damaged shards and codes, no space in the run folder, more slots than
GPUs, a port that is taken. `preflight` asks all hosts at once, in one round of ssh; each of them checks itself:

    echo '{"folder": "/home/me", "out": "run", "data": "shards"}' | python -m ksub_ds.cluster.host_check

Reads one JSON object on stdin (see `HostCheck`), prints one on stdout (see `HostReport`).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ksub_ds.cluster.remote import SSH_FAILED, CommandResult, python_module, run_on_all
from ksub_ds.common.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
LEAST_FREE_BYTES = 1 << 20
REACHABLE_SECONDS = 20.0
INSPECTION_SECONDS = 600.0  # reading all shards once


@dataclass(frozen=True)
class HostCheck:
    """What to check on a host; an empty text is not checked."""

    folder: str  # the working folder; other paths may be relative to it
    out: str = ""
    codes: str = ""
    data: str = ""
    slots: int = 1
    port: int = 0  # must be free here; 0: find one
    peer: str = ""  # another host, which must reach this one: asks for the rendezvous address


@dataclass(frozen=True)
class HostReport:
    """What was found on a host."""

    problems: list[str] = field(default_factory=list)  # sentences for the user
    versions: dict[str, str] = field(default_factory=dict)
    codes: str = ""  # their sha256
    data: str = ""  # the fingerprint of the shards
    hostname: str = ""
    address: str = ""
    port: int = 0


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all hosts; that of our own source is a hash of its content."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    found["ksub_ds"] = f"source {digest.hexdigest()[:12]}"
    return found


def inspect(check: HostCheck) -> HostReport:
    """Check everything on this host; one problem does not hide the next."""
    problems = []
    try:
        os.chdir(check.folder)
    except OSError as error:
        problem = f"working folder {check.folder}: {error.strerror}; the run needs the same folders on all hosts"
        return HostReport(problems=[problem], versions=versions(), hostname=socket.gethostname())
    codes = data = address = ""
    port = 0
    try:
        codes = _sha256_of_codes(check.codes) if check.codes else ""
    except UserError as error:
        problems.append(f"--codes: {error}")
    try:
        data = _fingerprint_of_shards(check.data) if check.data else ""
    except UserError as error:
        problems.append(f"--data: {error}")
    if check.out and (problem := _cannot_write(Path(check.out))):
        problems.append(problem)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus and check.slots > gpus:
        problems.append(f"slots={check.slots}, but it has {gpus} GPUs; write slots={gpus} in the hostfile")
    if check.peer:
        try:
            address, port = _own_address(check.peer), _port(check.port)
        except OSError as error:
            taken = f"port {check.port} is taken; choose another --master_port"
            problems.append(taken if check.port else f"cannot resolve {check.peer} ({error})")
    return HostReport(problems, versions(), codes, data, socket.gethostname(), address, port)


def _sha256_of_codes(path: str) -> str:
    from ksub_ds.codes.table import CodeTable

    return CodeTable.load(path).sha256


def _fingerprint_of_shards(folder: str) -> str:
    from ksub_ds.corpus.shards.dataset import ShardDataset

    return ShardDataset.open(folder).fingerprint  # reads every shard and compares its sha256


def _cannot_write(out: Path) -> str:
    """Return why the run folder cannot be written, or nothing; if it is missing, its nearest parent is tried."""
    try:
        there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        probe = there / f".probe-{socket.gethostname()}-{os.getpid()}"
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(4096))
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
        disk = os.statvfs(there)
    except OSError as error:
        return f"--out {out}: cannot be written ({error.strerror})"
    free = disk.f_bavail * disk.f_frsize
    return "" if free >= LEAST_FREE_BYTES else f"--out {out}: its disk is full ({free:,} bytes free)"


def _own_address(peer: str) -> str:
    """Return the address of this host on the route to another; no packet is sent."""
    if not peer or peer == "localhost":
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(peer), 9))
        return probe.getsockname()[0]


def _port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been closed is free
        probe.bind(("", wanted))
        return probe.getsockname()[1]


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
    try:  # first: a login shell may have troubles of its own, and say so
        return HostReport(**json.loads(result.output.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        if result.code == 127 or "No module named" in result.errors or "No such file" in result.errors:
            return f"has no ksub_ds at the same path as here ({result.last_line()}); install the same environment there"
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


if __name__ == "__main__":
    print(json.dumps(asdict(inspect(HostCheck(**json.load(sys.stdin))))))
