"""What one host says about itself before a run starts; `preflight` asks every host.

    echo '{"folder": "/home/me", "out": "run", "data": "shards"}' | python -m ksub_ds.cluster.inspection

Reads one JSON object on stdin (see `Question`), prints one on stdout (see `Answer`).
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
class Question:
    """What a host is asked. Empty text: not asked."""

    folder: str  # the working folder; other paths may stand relative to it
    out: str = ""
    codes: str = ""
    data: str = ""
    slots: int = 1
    port: int = 0  # to be free here; 0: find one
    peer: str = ""  # a host that must find this one: gives the address to meet at


@dataclass(frozen=True)
class Answer:
    """What it says: `problems` are whole sentences for the user."""

    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    codes: str = ""  # their sha256
    data: str = ""  # the fingerprint of the shards
    hostname: str = ""
    address: str = ""
    port: int = 0


def versions() -> dict[str, str]:
    """Version of everything that must be the same on all hosts; our own source by its content."""
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


def inspect(question: Question) -> Answer:
    """Look at everything; one problem does not hide the next."""
    problems = []
    try:
        os.chdir(question.folder)
    except OSError as error:
        problem = f"working folder {question.folder}: {error.strerror}; the run needs the same folders on all hosts"
        return Answer(problems=[problem], versions=versions(), hostname=socket.gethostname())
    codes = data = address = ""
    port = 0
    try:
        codes = _sha256_of_codes(question.codes) if question.codes else ""
    except UserError as error:
        problems.append(f"--codes: {error}")
    try:
        data = _fingerprint_of_shards(question.data) if question.data else ""
    except UserError as error:
        problems.append(f"--data: {error}")
    if question.out and (problem := _cannot_write(Path(question.out))):
        problems.append(problem)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus and question.slots > gpus:
        problems.append(f"slots={question.slots}, but it has {gpus} GPUs; write slots={gpus} in the hostfile")
    if question.peer:
        try:
            address, port = _own_address(question.peer), _port(question.port)
        except OSError as error:
            taken = f"port {question.port} is taken; choose another --master_port"
            problems.append(taken if question.port else f"does not find {question.peer} ({error})")
    return Answer(problems, versions(), codes, data, socket.gethostname(), address, port)


def _sha256_of_codes(path: str) -> str:
    from ksub_ds.codes.table import CodeTable

    return CodeTable.load(path).sha256


def _fingerprint_of_shards(folder: str) -> str:
    from ksub_ds.corpus.shards.dataset import ShardDataset

    return ShardDataset.open(folder).fingerprint  # reads every shard and compares its sha256


def _cannot_write(out: Path) -> str:
    """Why the run folder cannot be written, or nothing. Of one that is not there, the folder around it is tried."""
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
    """The address of this host on the way to another; no packet is sent."""
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
    print(json.dumps(asdict(inspect(Question(**json.load(sys.stdin))))))
