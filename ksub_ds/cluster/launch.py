"""Start a run on every slot of a hostfile, watch it, and restart it: what launch/pretrain.sh calls.

    python -m ksub_ds.cluster.launch --hostfile hosts --max-restarts 3 --preset tiny --codes codes.safetensors ...

Check the hosts (preflight) and start the ranks. When an attempt fails and a restart may help: kill what is left
of it on every host, find the hosts that still answer, wait until the run folder is free, and start again from the
last good checkpoint.

Exit codes are those of `python -m ksub_ds.pretrain` (ksub_ds/common/exit_codes.py). The last line names the rank
and the host that failed.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from ksub_ds.cluster import launchers, remote
from ksub_ds.cluster.attempt import Attempt, AttemptOutcome, HostLogs, classify_exit
from ksub_ds.cluster.host_check import HostCheck, preflight, unreachable
from ksub_ds.cluster.hostfile import chosen_hosts, is_this_machine, read_hostfile, without_hosts
from ksub_ds.cluster.launch_spec import (
    LAUNCH_ID,
    PLAIN_WORD,
    SECRET,
    LaunchSpec,
    travelling_environment,
    write_environment_file,
)
from ksub_ds.cluster.supervisor import GRACE_SECONDS
from ksub_ds.common import distributed
from ksub_ds.common.errors import RESUME, UserError
from ksub_ds.common.exit_codes import FAILED, run_main
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import get_logger
from ksub_ds.common.option_help import hanging
from ksub_ds.common.rank_env import OF_ONE_PROCESS
from ksub_ds.pretrain.checkpoint import FOLDER, MANIFEST, checkpoints

LOCK_SECONDS = 180.0  # a host that is cut off still holds the run folder, until its own watchdog ends it
# DeepSpeed's own options, passed on as they are.
TAKES_VALUE = (
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators", "--master_addr"),
    *("--master_port", "--node_rank", "--launcher", "--launcher_args", "--ssh_port", "--bind_core_list"),
    *("--venv_script", "--log_level", "--enable_each_rank_log"),
)
TAKES_NONE = ("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank", "--save_pid", "-q", "--quiet")
SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}
EXPORTED = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")  # beginnings of the variables that it exports by itself
# Ours.
OURS = {
    "--max-restarts": "restart after a failure, from the last good checkpoint, at most N times [0]",
    "--min-hosts": "continue with fewer hosts when some are lost, but not fewer than N [all]",
    "--host-wait": "seconds to wait for lost hosts before continuing without them or giving up [60]",
}


@dataclass(frozen=True)
class LaunchOptions:
    """The command line, divided."""

    deepspeed: dict[str, str | None] = field(default_factory=dict)  # None: an option without a value
    trainer: list[str] = field(default_factory=list)
    max_restarts: int = 0
    min_hosts: int | None = None  # None: all
    host_wait: int = 60

    def of_trainer(self, name: str) -> str:
        """Return the value of one of the trainer's options, or an empty text (of two, the trainer refuses the run)."""
        value = ""
        for index, word in enumerate(self.trainer):
            if word == name and index + 1 < len(self.trainer):
                value = self.trainer[index + 1]
            elif word.startswith(name + "="):
                value = word.removeprefix(name + "=")
        return value


def split_arguments(arguments: list[str]) -> LaunchOptions:
    """Divide a command line into launcher options and the trainer's arguments.

    Raises:
        UserError: an option lacks its value, or a number is not one.
    """
    deepspeed: dict[str, str | None] = {}
    ours: dict[str, int] = {}
    trainer: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if name in TAKES_VALUE or name in OURS:
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"{name}: needs a value")
            if name in OURS:
                ours[name[2:].replace("-", "_")] = _number(name, value)
            else:
                deepspeed[name] = value
        elif word in TAKES_NONE:
            deepspeed[word] = None
        elif name not in ("--local_rank", "--local-rank"):
            trainer.append(word)
    return LaunchOptions(deepspeed, trainer, **ours)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise UserError(f"{name} {text}: must be a whole number, 0 or more")
    return int(text)


def help_text() -> str:
    """Return the launcher's part of --help, as wide as the terminal."""
    rows = [
        ("--hostfile FILE", "lines of `host slots=N`; without it, all GPUs of this machine"),
        ("--launcher NAME", "for several hosts: pdsh, ssh or openmpi [pdsh; ssh where it is missing]"),
        *((f"{name} N", text) for name, text in OURS.items()),
        ("passed to deepspeed", " ".join((*TAKES_VALUE[1:], *TAKES_NONE))),
    ]
    column = max(len(name) for name, _ in rows) + 4
    return "launcher options:\n" + "\n".join(hanging(f"  {name}".ljust(column) + text, column) for name, text in rows)


def hosts_left(hosts: dict[str, int], min_hosts: int | None, host_wait: float, ssh_port: str | None) -> dict[str, int]:
    """Find the hosts to restart on, after waiting for lost ones to come back.

    Args:
        hosts: {host: slots} of the run.
        min_hosts: continue with fewer hosts, but not fewer than this; None: with all of them or not at all.
        host_wait: seconds to wait for lost hosts.
        ssh_port: ssh's port, if not the default.

    Raises:
        UserError: too few hosts answer.
    """
    deadline = time.monotonic() + host_wait
    least = len(hosts) if min_hosts is None else min_hosts
    while True:
        gone = unreachable(list(hosts), ssh_port)
        left = {host: slots for host, slots in hosts.items() if host not in gone}
        if not gone or (time.monotonic() > deadline and len(left) >= least):
            return left
        if time.monotonic() > deadline:
            fix = "" if min_hosts else "; --min-hosts N would continue with fewer"
            raise UserError(f"no restart: {', '.join(gone)} cannot be reached{fix}; {RESUME}")
        time.sleep(1)


def wait_for_lock(run: Path) -> None:
    """Wait until no process holds the run folder, at most three minutes; the next attempt would name the holder."""
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.suppress(OSError), (run / ".lock").open("r+b") as stream:
        while not try_lock(stream) and time.monotonic() < deadline:
            time.sleep(0.2)


def last_checkpoint(run: Path) -> str:
    """Return the newest checkpoint of a run, in words; damaged ones are skipped when the run resumes, not here."""
    found = [path for path in checkpoints(run / FOLDER) if (path / MANIFEST).exists()]
    return f"last checkpoint: {found[0]}" if found else "there is no checkpoint yet"


class Launch:
    """One call of launch/pretrain.sh: its options, hosts and logs, for all attempts.

    Raises:
        UserError: options or hostfile that cannot be used.
    """

    def __init__(self, options: LaunchOptions):
        self.options = options
        filters = [options.deepspeed.get(name) or "" for name in ("--include", "--exclude")]
        self.hostfile = options.deepspeed.get("--hostfile")
        self.hosts = chosen_hosts(read_hostfile(self.hostfile), *filters) if self.hostfile else {}
        alone = len(self.hosts) == 1 and is_this_machine(next(iter(self.hosts)))
        self.local = not self.hosts or (alone and "--force_multi" not in options.deepspeed)
        self.launcher = "local" if self.local else launchers.choose(options.deepspeed.get("--launcher"))
        if not self.local:
            launchers.check_plain_paths()
        if options.min_hosts is not None and not 1 <= options.min_hosts <= max(1, len(self.hosts)):
            raise UserError(f"--min-hosts {options.min_hosts}: the hostfile has {len(self.hosts)} hosts")
        if not options.of_trainer("--out"):
            raise UserError("--out: name the run folder")
        self.out = Path(options.of_trainer("--out"))
        self.logs = self._log_folder()
        self.ssh_port = options.deepspeed.get("--ssh_port")
        self.id = uuid.uuid4().hex
        self.hostnames: dict[str, str] = {}

    def _log_folder(self) -> Path | None:
        """Return RUN/logs, if RUN is a run folder or can become one."""
        with contextlib.suppress(OSError):
            there = {entry.name for entry in self.out.iterdir()} if self.out.exists() else set()
            if "recipe.json" in there or there <= {".lock", "STOP", "logs"}:
                return (self.out / "logs").resolve()
        return None

    def run(self) -> int:
        """Start attempts until one ends well or no further one may help; return the exit code."""
        hosts, restarts = dict(self.hosts), 0
        while True:
            rendezvous = self._check(hosts)
            started = time.time()
            outcome, stopped_by = self._attempt(hosts, *rendezvous)
            self._kill_orphans(hosts, outcome, patience=0 if stopped_by is None else GRACE_SECONDS + 5)
            status = classify_exit(outcome, self._failure_since(started), stopped_by)
            if status.code == FAILED and not outcome.ranks:
                print("\n".join(outcome.launcher_output[-15:]), file=sys.stderr)
            if not status.restart_may_help or restarts >= self.options.max_restarts:
                if status.line:
                    where = f"; {last_checkpoint(self.out)}" if status.code == FAILED else ""
                    print(status.line + where, file=sys.stderr, flush=True)
                return status.code
            restarts += 1
            print(status.line, file=sys.stderr, flush=True)
            if not self.local:
                hosts = hosts_left(self.hosts, self.options.min_hosts, self.options.host_wait, self.ssh_port)
            wait_for_lock(self.out)
            on = ", ".join(hosts) or "this machine"
            best = last_checkpoint(self.out)
            get_logger().info(f"restart {restarts} of {self.options.max_restarts} on {on}; {best}")

    def _check(self, hosts: dict[str, int]) -> tuple[str, int]:
        """Check all hosts before a start, and return address and port where the ranks meet.

        Raises:
            UserError: a host is not ready (each problem is printed, host by host).
        """
        port = self.options.deepspeed.get("--master_port") or "0"
        if not port.isdecimal() or int(port) > 65535:
            raise UserError(f"--master_port {port}: is not a port")
        if self.local:
            return "127.0.0.1" if self.hosts else "", int(port) or distributed.free_port()
        given = self.options.of_trainer
        check = HostCheck(str(Path.cwd()), out=given("--out"), codes=given("--codes"), data=given("--data"))
        ready = preflight(hosts, check, self.ssh_port, int(port))
        for host, problem in ready.problems:
            print(f"error: {host}: {problem}", file=sys.stderr)
        if ready.problems:
            bad = len({host for host, _ in ready.problems})
            raise UserError(f"{bad} of {len(hosts)} hosts not ready; nothing was started")
        self.hostnames = ready.hostnames
        return self.options.deepspeed.get("--master_addr") or ready.address, ready.port

    def _attempt(self, hosts: dict[str, int], address: str, port: int) -> tuple[AttemptOutcome, int | None]:
        """Start all ranks once; return how they ended, and the signal that asked this program to stop."""
        travelling = travelling_environment()
        if self.launcher == "openmpi":  # elsewhere DeepSpeed's per-host launcher sets them
            travelling |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        spec = LaunchSpec(self.id, str(Path.cwd()), travelling, self.options.trainer)
        logs = HostLogs(self.logs)
        hostnames = self.hostnames or dict.fromkeys([socket.gethostname()], next(iter(hosts), socket.gethostname()))
        work = Path.cwd() if self.local else Path("/")  # DeepSpeed writes it into a shell line
        with tempfile.TemporaryDirectory(prefix="ksub-launch-") as scratch:
            environment = self._environment(Path(scratch) / "deepspeed_env")
            options = self._options_for(hosts)
            hostfile = Path(scratch) / "hostfile"
            commands = launchers.launch_commands(self.launcher, hosts, options, spec, hostfile, address, port)
            attempt = Attempt(commands, environment, work, logs, hostnames, self._ask_to_stop)
            try:
                outcome = attempt.run()
            finally:
                logs.close()
        stopped_by = attempt.signals[0] if attempt.signals else None
        if stopped_by is not None:
            with contextlib.suppress(OSError):
                (self.out / "STOP").unlink(missing_ok=True)
        return outcome, stopped_by

    def _environment(self, path: Path) -> dict[str, str]:
        """Return the environment of the launcher's processes; write that of those on other hosts to `path`."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_ONE_PROCESS}
        environment[LAUNCH_ID] = self.id
        if self.local:
            if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):  # noqa: PTH110
                environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say so in a warning per process
            return environment
        write_environment_file(path, Path.cwd())
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{LAUNCH_ID}={self.id}\n")
        environment["DS_ENV_FILE"] = str(path)
        # DeepSpeed's shell line, which every user of a host can read: only plain words survive it.
        for name in [name for name in environment if name.startswith(EXPORTED)]:
            if SECRET.search(name) or not PLAIN_WORD.fullmatch(environment[name]):
                del environment[name]
        keep_alive = " ".join([*remote.NO_QUESTIONS, *remote.KEEP_ALIVE])
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {keep_alive}".strip()
        return environment

    def _options_for(self, hosts: dict[str, int]) -> dict[str, str | None]:
        """Return DeepSpeed's options without the hosts that are gone in --include and --exclude."""
        options, gone = dict(self.options.deepspeed), set(self.hosts) - set(hosts)
        for name in ("--include", "--exclude"):
            if options.get(name):
                left = without_hosts(options[name] or "", gone)
                options[name] = left
                if not left:
                    del options[name]
        return options

    def _ask_to_stop(self, number: int) -> None:
        """Write the STOP file: the ranks save and end at the next step. The lifeline reaches those it does not."""
        get_logger().info(f"{signal.Signals(number).name}: saving and stopping; once more to end at once")
        with contextlib.suppress(OSError):
            if self.out.is_dir():
                (self.out / "STOP").write_text("requeue\n" if number == signal.SIGUSR1 else "")

    def _kill_orphans(self, hosts: dict[str, int], outcome: AttemptOutcome, patience: float) -> None:
        """Kill what is left of this launch on every host that answers; `patience` is for ranks that are saving."""
        words = remote.python_module("ksub_ds.cluster.cleanup", self.id, str(patience))
        names = [host for host in hosts if host not in outcome.lost] if not self.local else ["localhost"]
        for host, result in remote.run_on_all(names, self.ssh_port, words, timeout=patience + 60).items():
            if result.code != 0:
                outcome.lost.setdefault(host, f"it cannot be reached: {result.last_line()}")
            elif result.output.strip() != "0":
                get_logger().info(f"{host}: killed {result.output.strip()} processes that were left")

    def _failure_since(self, started: float) -> Path:
        """Return the path of RUN/failure.json, after removing one that is older than this attempt."""
        path = self.out / "failure.json"
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < started - 1:
                path.unlink()
        return path


def main(arguments: list[str] | None = None) -> int:
    """Run the launcher and return its exit code.

    Args:
        arguments: the words of the command line. [those of this process]
    """
    words = sys.argv[1:] if arguments is None else arguments
    return run_main(lambda: Launch(split_arguments(words)).run())


if __name__ == "__main__":
    sys.exit(main())
