"""Hostfiles as DeepSpeed and MPI read them: lines of `host slots=N`, comments after `#`."""

import re
import socket
from pathlib import Path

from ksub_ds.common.errors import UserError

# Host names reach shells (pdsh, ssh) and option parsers: only names and addresses may pass.
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
# What ssh would take besides a name: `ssh://`, a user, a port, brackets around an IPv6 address (several colons).
LOGIN = re.compile(
    r"(?P<scheme>[A-Za-z]\w*://)?(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?(?P<host>[\w.-]+|\[[0-9A-Fa-f:.%\w]+\])"
    r"(?::(?P<port>\d{1,5}))?/?",
    re.ASCII,
)


def read_hostfile(path: str) -> dict[str, int]:
    """Read a hostfile into {host: slots}, in the order of the file.

    Raises:
        UserError: the file cannot be read, names no host, or has a line that the launchers could not use: of
            another form, with a user or a port, with a host named twice, or without slots.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--hostfile {path}: cannot be read ({reason})") from error
    hosts: dict[str, int] = {}
    named: set[str] = set()  # without case, as names of hosts are
    for number, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d{1,6})", line)
        login = LOGIN.fullmatch(found[1]) if found else None
        if login and login[0] != login["host"].strip("[]"):
            raise UserError(f"--hostfile {path}: line {number}: {_where_to_put(login)}")
        if not found or not HOST.fullmatch(found[1]):
            raise UserError(f"--hostfile {path}: line {number} is {line!r}, not `host slots=N`")
        host, slots = found[1], int(found[2])
        if host.lower() in named:
            raise UserError(f"--hostfile {path}: line {number} names {host!r} again; give each host one line")
        if slots < 1:
            raise UserError(
                f"--hostfile {path}: line {number} gives {host!r} no slots; write slots=1 or more, or remove the line"
            )
        hosts[host] = slots
        named.add(host.lower())
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write lines such as `localhost slots=2`")
    return hosts


def _where_to_put(login: re.Match[str]) -> str:
    """Say where user and port of a host go: pdsh, mpirun and DeepSpeed take names alone, and all of them use ssh."""
    host = login["host"].strip("[]")
    entries = [f"{key} {value}" for key, value in (("User", login["user"]), ("Port", login["port"])) if value]
    why = f"{login['scheme']!r} is not part of a name" if login["scheme"] else f"{login[0]!r} is more than a name"
    plain = f"{why}; write `{host} slots=...`"
    if not entries:
        return plain
    return f"{plain}, and into ~/.ssh/config of this machine: {', '.join([f'Host {host}', *entries])}, a line each"


def chosen_hosts(hosts: dict[str, int], include: str, exclude: str) -> dict[str, int]:
    """Return the hosts that DeepSpeed's --include or --exclude leave, with their slots.

    Args:
        hosts: slots of each host of the hostfile.
        include: "node1@node2:0,1"; empty for all hosts.
        exclude: the same form; a host with slots named stays. Empty for none.

    Raises:
        UserError: a host is not in the file, or no host is left.
    """
    for name, text in (("--include", include), ("--exclude", exclude)):
        parts = [part for part in text.split("@") if part]
        unknown = [part for part in parts if part.split(":")[0] not in hosts]
        if unknown:
            raise UserError(f"{name} {text}: {unknown[0]!r} is not in the hostfile")
        if parts and name == "--include":
            named = {part.split(":")[0] for part in parts}
            return {host: slots for host, slots in hosts.items() if host in named}
        hosts = {host: slots for host, slots in hosts.items() if host not in parts}
    if not hosts:
        raise UserError("--exclude leaves no host")
    return hosts


def without_hosts(filter_text: str, gone: set[str]) -> str:
    """Return an --include or --exclude without the hosts that are gone."""
    return "@".join(part for part in filter_text.split("@") if part.split(":")[0] not in gone)


def write_hostfile(path: Path, hosts: dict[str, int]) -> None:
    """Write a hostfile."""
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()), encoding="utf-8")


def is_this_machine(host: str) -> bool:
    """Return whether a name or address is this machine's own."""
    if host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        with socket.socket() as probe:  # an address can be bound only where it lives
            probe.bind((socket.gethostbyname(host), 0))
        return True
    except OSError:
        return False
