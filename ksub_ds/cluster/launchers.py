"""The command lines that start one guardian (`ksub_ds.cluster.worker`) per slot.

local     `deepspeed` on this machine, no ssh
pdsh      `deepspeed --launcher pdsh`, its default for several hosts
openmpi   `deepspeed --launcher openmpi`
ssh       one ssh a host, each starting DeepSpeed's per-host launcher, where there is no pdsh
"""

import base64
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.cluster.hostfile import write_hostfile
from ksub_ds.cluster.launch_spec import LAUNCH_ID, PLAIN_WORD, Errand
from ksub_ds.cluster.remote import python_module, ssh
from ksub_ds.common.errors import UserError

REMOTE = ("pdsh", "ssh", "openmpi")
GUARDIAN = "ksub_ds.cluster.worker"


@dataclass(frozen=True)
class Start:
    """One process to start: `host` where it stands for one host alone."""

    command: list[str]
    host: str | None = None


def choose(asked: str | None) -> str:
    """The launcher for several hosts.

    Raises:
        UserError: unknown, or not installed.
    """
    if asked is None:
        return "pdsh" if shutil.which("pdsh") else "ssh"
    if asked not in REMOTE:
        raise UserError(f"--launcher {asked}: choose one of {', '.join(REMOTE)}")
    program = {"pdsh": "pdsh", "ssh": "ssh", "openmpi": "mpirun"}[asked]
    if shutil.which(program) is None:
        raise UserError(f"--launcher {asked}: {program} is not installed here; install it, or choose another launcher")
    return asked


def check_plain_paths() -> None:
    """DeepSpeed writes the interpreter's path into a shell line without quotes.

    Raises:
        UserError: it has characters that a shell would read.
    """
    if not PLAIN_WORD.fullmatch(sys.executable):
        raise UserError(f"{sys.executable}: Python's path has characters that DeepSpeed cannot pass on; move it")


def starts(
    launcher: str,
    hosts: dict[str, int],
    options: dict[str, str | None],
    errand: Errand,
    hostfile: Path,
    address: str,
    port: int,
) -> list[Start]:
    """What to start for `launcher` on `hosts`; writes `hostfile` for DeepSpeed to read.

    Args:
        options: DeepSpeed's own, passed on.
        address, port: where the ranks meet.
    """
    if launcher == "ssh":
        return _by_ssh(hosts, options, errand, address, port)
    options = {name: value for name, value in options.items() if name not in ("--launcher", "--hostfile")}
    if hosts:
        write_hostfile(hostfile, hosts)
        options |= {"--hostfile": str(hostfile), "--no_ssh_check": None}
    options |= {"--master_port": str(port)} | ({"--master_addr": address} if address else {})
    if launcher != "local":
        options |= {"--launcher": launcher, "--force_multi": None}
    if not {"--log_level", "-q", "--quiet"} & options.keys():
        options["--log_level"] = "warning"
    words = [word for name, value in options.items() for word in ([name] if value is None else [name, value])]
    return [Start(["deepspeed", *words, "--no_local_rank", "--module", GUARDIAN, errand.pack()])]


def _by_ssh(
    hosts: dict[str, int], options: dict[str, str | None], errand: Errand, address: str, port: int
) -> list[Start]:
    for name in ("--num_nodes", "--num_gpus", "--num_accelerators", "--launcher_args"):
        if name in options:
            raise UserError(f"{name}: is not for --launcher ssh; say it in the hostfile, or install pdsh")
    if any(":" in (options.get(name) or "") for name in ("--include", "--exclude")):
        raise UserError("--include, --exclude: --launcher ssh takes whole hosts only; install pdsh for single devices")
    world = json.dumps({host: list(range(slots)) for host, slots in hosts.items()})
    world = base64.urlsafe_b64encode(world.encode()).decode()
    passed_on = [name for name in ("--bind_cores_to_rank",) if name in options]
    found = []
    for number, host in enumerate(hosts):
        words = python_module(
            "deepspeed.launcher.launch",
            *(f"--world_info={world}", f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}"),
            *("--no_local_rank", "--log_level=warning", *passed_on, "--module", GUARDIAN, errand.pack()),
        )
        environment = errand.environment | {LAUNCH_ID: errand.launch_id}
        variables = [f"{name}={value}" for name, value in environment.items()]
        found.append(Start(ssh(host, options.get("--ssh_port"), "env", *variables, *words), host))
    return found
