"""The command lines that start one supervisor (`ksub_ds.cluster.supervisor`) per slot.

local     `deepspeed` on this machine, no ssh
pdsh      `deepspeed --launcher pdsh`, its default for several hosts
openmpi   `deepspeed --launcher openmpi`
ssh       one ssh per host, each starting DeepSpeed's per-host launcher, where there is no pdsh
"""

import base64
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.cluster.hostfile import write_hostfile
from ksub_ds.cluster.launch_spec import LAUNCH_ID, PLAIN_WORD, LaunchSpec
from ksub_ds.cluster.remote import python_module, ssh
from ksub_ds.common.errors import UserError

REMOTE = ("pdsh", "ssh", "openmpi")
SUPERVISOR = "ksub_ds.cluster.supervisor"


@dataclass(frozen=True)
class LaunchCommand:
    """One process to start."""

    words: list[str]
    host: str | None = None  # the only host it serves, if it serves only one


def choose(asked: str | None) -> str:
    """Choose the launcher for several hosts.

    Args:
        asked: the user's --launcher, if given.

    Raises:
        UserError: the launcher is unknown, or not installed.
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
    """Check the interpreter's path, which DeepSpeed writes into a shell line without quotes.

    Raises:
        UserError: it has characters that a shell would interpret.
    """
    if not PLAIN_WORD.fullmatch(sys.executable):
        raise UserError(f"{sys.executable}: Python's path has characters that DeepSpeed cannot pass on; move it")


def launch_commands(
    launcher: str,
    hosts: dict[str, int],
    options: dict[str, str | None],
    spec: LaunchSpec,
    hostfile: Path,
    address: str,
    port: int,
) -> list[LaunchCommand]:
    """Build the commands that start all ranks, and write the hostfile that DeepSpeed reads.

    Args:
        launcher: local, pdsh, openmpi or ssh.
        hosts: {host: slots}; empty for all devices of this machine.
        options: DeepSpeed's own options, passed on.
        spec: what each rank runs.
        hostfile: the file to write.
        address: where the ranks meet; empty leaves it to DeepSpeed.
        port: the port there.

    Raises:
        UserError: an option that the ssh launcher does not know.
    """
    if launcher == "ssh":
        return _by_ssh(hosts, options, spec, address, port)
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
    return [LaunchCommand(["deepspeed", *words, "--no_local_rank", "--module", SUPERVISOR, spec.pack()])]


def _by_ssh(
    hosts: dict[str, int], options: dict[str, str | None], spec: LaunchSpec, address: str, port: int
) -> list[LaunchCommand]:
    for name in ("--num_nodes", "--num_gpus", "--num_accelerators", "--launcher_args"):
        if name in options:
            raise UserError(f"{name}: --launcher ssh does not take it; write slots into the hostfile, or install pdsh")
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
            *("--no_local_rank", "--log_level=warning", *passed_on, "--module", SUPERVISOR, spec.pack()),
        )
        environment = spec.environment | {LAUNCH_ID: spec.launch_id}
        variables = [f"{name}={value}" for name, value in environment.items()]
        found.append(LaunchCommand(ssh(host, options.get("--ssh_port"), "env", *variables, *words), host))
    return found
