"""Several hosts on one machine: each a network, PID, mount and UTS namespace with its own address and sshd.

    python tests/cluster/namespaces.py 2 'hostname; ssh node2 hostname'     # node1 and node2; runs on node1

Nothing is left behind however the owner ends: no namespace and no link has a name outside, every process
hangs on its parent by a pipe or a death signal, and the kernel removes a namespace with its last process.
Files are shared, as on a cluster's network disk; `mount` gives one host something else at a path.

A PID namespace of its own is a must for each host: DeepSpeed ends its runs by `pkill -f`.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

NETWORK = "10.78.0"
LOCK = Path(tempfile.gettempdir()) / "ksub-cluster.lock"
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The first process of a host. It waits for its network, then becomes sshd.
INIT = """
set -e
hostname "$NAME"
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
echo up
read -r _
exec /usr/sbin/sshd -D -e -f "$FOLDER/sshd_$NAME.conf"
"""


def why_not() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts as namespaces need Linux and root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    probe = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc"]
    made = subprocess.run([*probe, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    return None if made.returncode == 0 else f"this machine forbids namespaces: {made.stderr.strip()[-200:]}"


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The condition's first true value.

    Raises:
        TimeoutError: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s: {what}")
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def alone(seconds: float = 300.0) -> Iterator[None]:
    """Wait for another set of hosts on this machine to go. They do not meet, but they slow each other down."""
    with LOCK.open("w") as stream:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield


class Host:
    """One host; `Hosts` makes it."""

    def __init__(self, name: str, address: str, folder: Path, switch: int):
        self.name, self.address, self.folder, self._switch = name, address, folder, switch
        self._outer: subprocess.Popen[str] | None = None
        self.init = 0  # its first process, as seen from outside

    def power_on(self) -> None:
        """Start the host and its sshd."""
        self.folder.joinpath(f"sshd_{self.name}.conf").write_text(
            f"Port 22\nListenAddress {self.address}\nHostKey {self.folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nPermitRootLogin prohibit-password\nUsePAM no\n"
            "PasswordAuthentication no\nStrictModes no\nMaxStartups 100\nMaxSessions 100\n"
        )
        new = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        log = self.folder.joinpath(f"sshd_{self.name}.log").open("a")
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *new, "bash", "-c", INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={"PATH": SYSTEM_PATH, "NAME": self.name, "FOLDER": str(self.folder)},
        )
        assert self._outer.stdout is not None and self._outer.stdin is not None
        assert self._outer.stdout.readline() == "up\n", log.name
        outer = self._outer.pid
        self.init = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])
        port = f"to-{self.name}"
        link = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self.init)]
        inside(self._switch, *link)
        inside(self._switch, "ip", "link", "set", port, "master", "br0", "up")
        inside(self.init, "ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        inside(self.init, "ip", "link", "set", "eth0", "up")
        self._outer.stdin.write("go\n")
        self._outer.stdin.flush()

    def answers(self, asker: "Host | None" = None) -> bool:
        """Whether another host reaches this one by ssh, or, without another, it does so itself."""
        return (asker or self).run("ssh", "-o", "ConnectTimeout=2", self.name, "true", check=False).returncode == 0

    def power_off(self) -> None:
        """End the host and all its processes at once."""
        assert self._outer is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._outer.wait()

    def cut(self) -> None:
        """Pull the network cable: nobody hears of the host any more, and nothing tells so."""
        inside(self._switch, "ip", "link", "set", f"to-{self.name}", "down")

    def join(self) -> None:
        """Put the network cable back."""
        inside(self._switch, "ip", "link", "set", f"to-{self.name}", "up")

    def command(self, *words: object, cwd: Path | None = None) -> list[str]:
        """The command line that runs `words` on this host."""
        enter = ["nsenter", "-t", str(self.init), "-n", "-u", "-p", "-m", f"--wdns={cwd or Path.cwd()}"]
        return [*enter, *map(str, words)]

    def run(
        self,
        *words: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        check: bool = True,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host."""
        command = self.command(*words, cwd=cwd)
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
        assert not check or done.returncode == 0, (words, done.returncode, done.stdout[-4000:], done.stderr[-4000:])
        return done

    def start(
        self, *words: object, log: IO[str], cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on this host; its output goes to `log`."""
        return subprocess.Popen(self.command(*words, cwd=cwd), stdout=log, stderr=log, text=True, env=env)

    def mount(self, *words: object) -> None:
        """`mount` that this host alone sees; `--bind` to change a file, tmpfs for a small disk."""
        self.run("mount", *words)

    def unmount(self, path: Path) -> None:
        """Undo `mount`."""
        self.run("umount", "-l", path)

    def processes(self, *words: str) -> list[int]:
        """Processes of this host (pids as seen from outside) whose command line holds every one of `words`."""
        own, found = Path(f"/proc/{self.init}/ns/pid").stat().st_ino, []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # ended meanwhile
                if entry.name.isdigit() and (entry / "ns" / "pid").stat().st_ino == own:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line and all(word in line for word in words):
                        found.append(int(entry.name))
        return sorted(found)


def inside(pid: int, *words: str) -> None:
    """Run a command in the network of another process."""
    done = subprocess.run(["nsenter", "-t", str(pid), "-n", *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


class Hosts:
    """`head` (a login node) and node1 ... nodeN on one switch; a context manager.

    Args:
        folder: for keys and logs.
        count: N.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self._count = folder, count
        self._switch: subprocess.Popen[str] | None = None
        self.hosts: list[Host] = []

    def __getitem__(self, number: int) -> Host:
        """0 is the head."""
        return self.hosts[number]

    def __enter__(self) -> "Hosts":
        try:
            self._power_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _power_on(self) -> None:
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        names = ["head", *(f"node{number}" for number in range(1, self._count + 1))]
        addresses = [f"{NETWORK}.{number or 254}" for number in range(self._count + 1)]
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(addresses, names, strict=True))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/key\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        bridge = "ip link add br0 type bridge && ip link set br0 up && echo up && exec cat"
        pipe = subprocess.PIPE
        self._switch = subprocess.Popen(["unshare", "--net", "sh", "-c", bridge], stdin=pipe, stdout=pipe, text=True)
        assert self._switch.stdout is not None and self._switch.stdout.readline() == "up\n"
        for name, address in zip(names, addresses, strict=True):
            host = Host(name, address, self.folder, self._switch.pid)
            host.power_on()
            self.hosts.append(host)
        for host in self.hosts:
            wait_until(host.answers, f"sshd of {host.name} does not answer")

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.power_off()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def hostfile(self, path: Path, numbers: Sequence[int], slots: int = 1) -> Path:
        """Write a hostfile of some of the nodes."""
        path.write_text("".join(f"node{number} slots={slots}\n" for number in numbers))
        return path


def main() -> int:
    """Run one shell line on node1 of a fresh set of hosts."""
    count, line = int(sys.argv[1]), sys.argv[2]
    reason = why_not()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, alone(), Hosts(Path(folder), count) as hosts:
        return subprocess.run(hosts[1].command("bash", "-c", line)).returncode


if __name__ == "__main__":
    sys.exit(main())
