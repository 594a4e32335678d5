"""The check of one host before a run starts; `preflight` runs it on every host.

    echo '{"folder": "/home/me", "out": "run", "data": "shards"}' | python -m ksub_ds.cluster.host_check

Reads one JSON object on stdin (see `HostCheck`), prints one on stdout (see `HostReport`).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ksub_ds.common.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
LEAST_FREE_BYTES = 1 << 20


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


if __name__ == "__main__":
    print(json.dumps(asdict(inspect(HostCheck(**json.load(sys.stdin))))))
