"""Commands on other hosts: ssh that never prompts and always ends, with every word quoted."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.cluster.hostfile import is_this_machine

ROOT = Path(__file__).resolve().parents[2]
# A host that is cut off sends nothing: ssh asks it every 5 s and gives up after 3 silent answers.
KEEP_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
NO_QUESTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_FAILED = 255


@dataclass(frozen=True)
class CommandResult:
    """How a command on a host ended; `code` is None if it did not end in time."""

    code: int | None
    output: str
    errors: str

    def last_line(self) -> str:
        """Return the last line of its output, or its exit code if it printed nothing."""
        lines = (self.errors.strip() or self.output.strip()).splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


def ssh(host: str, port: str | None, *words: str) -> list[str]:
    """Return the command line that runs `words` on a host."""
    at = ["-p", port] if port else []
    return ["ssh", *NO_QUESTIONS, *KEEP_ALIVE, *at, host, shlex.join(words)]


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the words that run a module of ours on any host that has this environment at the same path."""
    return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", module, *arguments]


def run_on(host: str, port: str | None, words: list[str], text: str = "", timeout: float = 60.0) -> CommandResult:
    """Run a command on a host, without ssh if it is this machine.

    Args:
        host: its name or address.
        port: ssh's port, if not the default.
        words: the command.
        text: its standard input.
        timeout: seconds.
    """
    here = is_this_machine(host)
    if not here and shutil.which("ssh") is None:
        return CommandResult(SSH_FAILED, "", "ssh is not installed here")
    try:
        command = words if here else ssh(host, port, *words)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return CommandResult(None, "", f"no answer in {timeout:.0f} s")
    return CommandResult(done.returncode, done.stdout, done.stderr)


def run_on_all(
    hosts: Iterable[str], port: str | None, words: list[str], text: dict[str, str] | None = None, timeout: float = 60.0
) -> dict[str, CommandResult]:
    """Run a command on all hosts at once; the arguments are those of `run_on`, `text` by host."""
    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, max(1, len(names)))) as pool:
        texts = [(text or {}).get(host, "") for host in names]
        results = pool.map(lambda pair: run_on(pair[0], port, words, pair[1], timeout), zip(names, texts, strict=True))
        return dict(zip(names, results, strict=True))
