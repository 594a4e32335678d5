"""Start workers on the machines of a hostfile: what launch/evaluate.sh calls.

    python -m ksub_ds.evaluate.hosts --hostfile launch/hostfile.example xnli --model model --data xnli ...

One worker for each slot. Workers on this machine are plain processes; on others they are started by ssh, in the same
folder with the same Python. They find each other by the queue in --out, so that folder must be shared; nothing else
connects them.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksub_ds.cluster.hostfile import is_this_machine, read_hostfile
from ksub_ds.cluster.launch_spec import travelling_environment
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import DONE, INTERRUPTED, USER_ERROR, exit_code_of_signal, run_main
from ksub_ds.common.rank_env import OF_ONE_PROCESS

SSH = ("ssh", "-tt", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")


def worker_command(host: str, place: int, slots: int, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of worker number `place` of a host."""
    own = {"KSUB_WORKER": str(place)}
    if "OMP_NUM_THREADS" not in os.environ and is_this_machine(host):
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // slots))
    command = [sys.executable, "-m", "ksub_ds.evaluate", *arguments]
    if is_this_machine(host):
        return command, dict(os.environ) | own
    setting = [f"{name}={value}" for name, value in sorted((travelling_environment() | own).items())]
    line = f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*setting, *command])}"
    return [*SSH, host, line], dict(os.environ)


def start_workers(hosts: dict[str, int], arguments: Sequence[str]) -> int:
    """Run one worker a slot until all have ended, and return their exit code.

    A worker that fails leaves its job to the others, so the code is DONE when one of them ended well; USER_ERROR
    ends all; else it is the highest.
    """
    processes: list[subprocess.Popen[Any]] = []
    for name in OF_ONE_PROCESS:
        os.environ.pop(name, None)  # the outer launcher's; a worker stands alone
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(exit_code_of_signal(number)))
    try:
        for host, slots in hosts.items():
            for place in range(slots):
                command, environment = worker_command(host, place, slots, arguments)
                quiet = subprocess.DEVNULL if processes else None  # the first one prints the table
                processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=quiet))
        while any(process.poll() is None for process in processes):
            if any(process.returncode == USER_ERROR for process in processes if process.poll() is not None):
                break  # the user's mistake: every worker would make it
            time.sleep(0.2)
    except KeyboardInterrupt:
        return INTERRUPTED  # the terminal has interrupted the workers too
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
        signal.signal(signal.SIGTERM, before)
    codes = [process.returncode for process in processes]
    if USER_ERROR in codes:
        return USER_ERROR
    if DONE in codes:  # one that ended well saw all jobs done
        return DONE
    return max(exit_code_of_signal(-code) if code < 0 else code for code in codes)


def main(arguments: Sequence[str]) -> int:
    """Separate the hostfile from the other arguments, start the workers, and return the exit code.

    Raises:
        UserError: --hostfile has no value, or names a file that cannot be used.
    """
    rest, hostfile = [], None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--hostfile", "-H"):
            hostfile = value if equals else next(words, "")
        else:
            rest.append(word)
    if hostfile is None:
        from ksub_ds.evaluate.__main__ import main as evaluate_main

        return evaluate_main(rest)
    if not hostfile:
        raise UserError("--hostfile: needs a value")
    return start_workers(read_hostfile(hostfile), rest)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
