"""Start a run on every slot of a hostfile, watch it, and start it again: what launch/pretrain.sh calls.

    python -m ksub_ds.cluster.launch --hostfile hosts --max-restarts 3 --preset tiny --codes codes.safetensors ...

Check the hosts (preflight), start the ranks, and when an attempt fails where a restart may help: end what is
left of it on every host, see which hosts still answer, and start again from the last good checkpoint.

Exit codes are those of `python -m ksub_ds.pretrain`: 0 done, 2 the user's mistake, 70 failed, 75 to be started
again, 128 + n after signal n. The last line names the rank and the host that failed.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

from ksub_ds.cluster import launchers, preflight, remote
from ksub_ds.cluster.attempt import Attempt, HostLogs, Outcome
from ksub_ds.cluster.exit_status import FAILED, USER_ERROR, judge
from ksub_ds.cluster.hostfile import chosen_hosts, is_this_machine, read_hostfile, without_hosts
from ksub_ds.cluster.inspection import Question
from ksub_ds.cluster.launch_spec import LAUNCH_ID, PLAIN_WORD, Errand, travelling_environment, write_environment_file
from ksub_ds.cluster.options import Options, split_arguments
from ksub_ds.cluster.preflight import reachable
from ksub_ds.cluster.worker import GRACE_SECONDS
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.pretrain.checkpoint import MANIFEST, checkpoints

# Merged docstring, to be folded in:
# """Between two attempts: which hosts are left, is the run folder free, and where does the run continue."""


LOCK_SECONDS = 180.0  # a host that is cut off still holds the run folder, until its own watchdog ends it


def hosts_left(hosts: dict[str, int], min_hosts: int | None, host_wait: float, ssh_port: str | None) -> dict[str, int]:
    """The hosts to restart on; waits up to `host_wait` seconds for lost ones to come back.

    Args:
        min_hosts: go on with fewer, but not fewer than these; None: all or none.

    Raises:
        UserError: too few of them answer.
    """
    deadline = time.monotonic() + host_wait
    least = len(hosts) if min_hosts is None else min_hosts
    while True:
        gone = reachable(list(hosts), ssh_port)
        left = {host: slots for host, slots in hosts.items() if host not in gone}
        if not gone or (time.monotonic() > deadline and len(left) >= least):
            return left
        if time.monotonic() > deadline:
            fix = "" if min_hosts else "; --min-hosts N would go on with fewer"
            raise UserError(f"no restart: {', '.join(gone)} cannot be reached{fix}; the same command continues")
        time.sleep(1)


def wait_for_lock(run: Path) -> None:
    """Wait until nobody holds the run folder; after three minutes the next attempt will say who does."""
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.suppress(OSError), (run / ".lock").open("r+b") as stream:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)
            else:
                return


def last_checkpoint(run: Path) -> str:
    """The newest checkpoint of a run, in words. Damaged ones are passed over when the run continues, not here."""
    found = [path for path in checkpoints(run / "checkpoints") if (path / MANIFEST).exists()]
    return f"last checkpoint: {found[0]}" if found else "there is no checkpoint yet"


# What an outer launcher, or DeepSpeed's, has said to this process.
RANKS_OF_OTHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"),
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; a user's mistake is one line."""
    try:
        return Launch(split_arguments(sys.argv[1:] if arguments is None else arguments)).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr, flush=True)
        return 130


class Launch:
    """One call of launch/pretrain.sh."""

    def __init__(self, options: Options):
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
        self.out = Path(options.of_trainer("--out") or ".")
        self.logs = self._log_folder()
        self.ssh_port = options.deepspeed.get("--ssh_port")
        self.id = uuid.uuid4().hex
        self.hostnames: dict[str, str] = {}

    def _log_folder(self) -> Path | None:
        """RUN/logs, where RUN is or may become a run folder."""
        if not self.options.of_trainer("--out"):
            return None
        with contextlib.suppress(OSError):
            there = {entry.name for entry in self.out.iterdir()} if self.out.exists() else set()
            if "recipe.json" in there or there <= {".lock", "STOP", "logs"}:
                return (self.out / "logs").resolve()
        return None

    def run(self) -> int:
        """Attempts until one ends well, or no further one may help."""
        hosts, restarts = dict(self.hosts), 0
        while True:
            meeting = self._check(hosts)
            started = time.time()
            outcome, stopped_by = self._attempt(hosts, *meeting)
            self._sweep(hosts, outcome, patience=0 if stopped_by is None else GRACE_SECONDS + 5)
            verdict = judge(outcome, self._failure_since(started), stopped_by)
            if verdict.code == FAILED and not outcome.ranks:
                print("\n".join(outcome.noise[-15:]), file=sys.stderr)
            if not verdict.restart_may_help or restarts >= self.options.max_restarts:
                if verdict.line:
                    where = f"; {last_checkpoint(self.out)}" if verdict.code == FAILED else ""
                    print(verdict.line + where, file=sys.stderr, flush=True)
                return verdict.code
            restarts += 1
            print(verdict.line, file=sys.stderr, flush=True)
            if not self.local:
                hosts = hosts_left(self.hosts, self.options.min_hosts, self.options.host_wait, self.ssh_port)
            wait_for_lock(self.out)
            on = ", ".join(hosts) or "this machine"
            best = last_checkpoint(self.out)
            get_logger().info(f"restart {restarts} of {self.options.max_restarts} on {on}; {best}")

    def _check(self, hosts: dict[str, int]) -> tuple[str, int]:
        """Preflight of all hosts; where the ranks meet.

        Raises:
            UserError: a host is not ready (each problem is printed, host by host).
        """
        port = self.options.deepspeed.get("--master_port") or "0"
        if not port.isdecimal() or int(port) > 65535:
            raise UserError(f"--master_port {port}: is no port")
        if self.local:
            return "127.0.0.1" if self.hosts else "", int(port) or free_port()
        given = self.options.of_trainer
        question = Question(str(Path.cwd()), out=given("--out"), codes=given("--codes"), data=given("--data"))
        ready = preflight.preflight(hosts, question, self.ssh_port, int(port))
        for host, problem in ready.problems:
            print(f"error: {host}: {problem}", file=sys.stderr)
        if ready.problems:
            bad = len({host for host, _ in ready.problems})
            raise UserError(f"{bad} of {len(hosts)} hosts not ready; nothing was started")
        self.hostnames = ready.hostnames
        return self.options.deepspeed.get("--master_addr") or ready.address, ready.port

    def _attempt(self, hosts: dict[str, int], address: str, port: int) -> tuple[Outcome, int | None]:
        """One start of all ranks; returns how it ended, and the signal that asked this program to stop."""
        travelling = travelling_environment()
        if self.launcher == "openmpi":  # the others are told by DeepSpeed's per-host launcher
            travelling |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        errand = Errand(self.id, str(Path.cwd()), travelling, self.options.trainer)
        logs = HostLogs(self.logs)
        hostnames = self.hostnames or dict.fromkeys([socket.gethostname()], next(iter(hosts), socket.gethostname()))
        work = Path.cwd() if self.local else Path("/")  # DeepSpeed writes it into a shell line
        with tempfile.TemporaryDirectory(prefix="ksub-launch-") as scratch:
            environment = self._environment(Path(scratch) / "deepspeed_env")
            options = self._options_for(hosts)
            hostfile = Path(scratch) / "hostfile"
            starts = launchers.starts(self.launcher, hosts, options, errand, hostfile, address, port)
            attempt = Attempt(starts, environment, work, logs, hostnames, self._ask_to_stop)
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
        """Of the launcher's processes; writes DeepSpeed's environment file, for those on other hosts, to `path`."""
        environment = {name: value for name, value in os.environ.items() if name not in RANKS_OF_OTHERS}
        environment[LAUNCH_ID] = self.id
        if self.local:
            if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):  # noqa: PTH110
                environment.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say so in a warning per process
            return environment
        write_environment_file(path, Path.cwd())
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"{LAUNCH_ID}={self.id}\n")
        environment["DS_ENV_FILE"] = str(path)
        # DeepSpeed exports what begins with PYTHON; only plain words survive its shell line.
        for name in [name for name in environment if name.startswith("PYTHON")]:
            if not PLAIN_WORD.fullmatch(environment[name]):
                del environment[name]
        keep_alive = " ".join([*remote.NO_QUESTIONS, *remote.KEEP_ALIVE])
        environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {keep_alive}".strip()
        return environment

    def _options_for(self, hosts: dict[str, int]) -> dict[str, str | None]:
        """DeepSpeed's options with the hosts that are gone taken out of --include and --exclude."""
        options, gone = dict(self.options.deepspeed), set(self.hosts) - set(hosts)
        for name in ("--include", "--exclude"):
            if options.get(name):
                left = without_hosts(options[name] or "", gone)
                options[name] = left
                if not left:
                    del options[name]
        return options

    def _ask_to_stop(self, number: int) -> None:
        """The STOP file: the ranks save and end at the next step. Where it does not reach them, the lifeline does."""
        get_logger().info(f"{signal.Signals(number).name}: saving and stopping; once more to end at once")
        with contextlib.suppress(OSError):
            if self.out.is_dir():
                (self.out / "STOP").write_text("requeue\n" if number == signal.SIGUSR1 else "")

    def _sweep(self, hosts: dict[str, int], outcome: Outcome, patience: float) -> None:
        """End what is left of this launch on every host that answers; `patience` is for ranks that are saving."""
        words = remote.python_module("ksub_ds.cluster.cleanup", self.id, str(patience))
        names = [host for host in hosts if host not in outcome.lost] if not self.local else ["localhost"]
        for host, result in remote.run_on_all(names, self.ssh_port, words, timeout=patience + 60).items():
            if result.code != 0:
                outcome.lost.setdefault(host, f"it cannot be reached: {result.last_line()}")
            elif result.output.strip() != "0":
                get_logger().info(f"{host}: ended {result.output.strip()} processes that were left")

    def _failure_since(self, started: float) -> Path:
        """RUN/failure.json, after removing one that is older than this attempt."""
        path = self.out / "failure.json"
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < started - 1:
                path.unlink()
        return path


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
