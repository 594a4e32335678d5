"""A SLURM of our own over namespace hosts: slurmctld on the head, slurmd on every node, munged on all.

Own ports, own folders, and it ends with the hosts: every daemon is a process of one of them.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .namespaces import SYSTEM_PATH, Host, Hosts, wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# cred_expire: a requeued job waits for so long; 120 s by default.
CONFIGURATION = """
ClusterName=ksub
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=30
JobRequeue=1
MailProg=/bin/true
"""


def why_not() -> str | None:
    """Why there can be no SLURM here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


class Slurm:
    """A running SLURM. Commands are run on the head."""

    def __init__(self, hosts: Hosts, folder: Path, environment: dict[str, str]):
        self.hosts, self.folder = hosts, folder
        folder.chmod(0o755)
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
        nodes = hosts.hosts[1:]
        lines = [f"NodeName={h.name} NodeAddr={h.address} CPUs=2 RealMemory=4000 State=UNKNOWN" for h in nodes]
        lines.append(f"PartitionName=main Nodes=node[1-{len(nodes)}] Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder) + "\n".join(lines) + "\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        for host in hosts.hosts:
            self._munged(host)
        self._start(hosts[0], "slurmctld")
        for host in nodes:
            (folder / f"spool-{host.name}").mkdir()
            self._start(host, "slurmd", "-N", host.name)
        wait_until(lambda: self.idle() == len(nodes), f"SLURM does not come up, see {folder}")

    def _munged(self, host: Host) -> None:
        """Each host has its own, as on a real cluster: one that sees a credential twice calls it replayed."""
        host.run("mkdir", "-p", "/run/munge")
        files = [f"--{kind}-file={self.folder}/munged-{host.name}.{kind}" for kind in ("log", "pid", "seed")]
        socket = "--socket=/run/munge/munge.socket"
        self._start(host, "munged", "--force", socket, f"--key-file={self.folder}/munge.key", *files)

    def _start(self, host: Host, *words: str) -> None:
        """Start a daemon; it goes into the background by itself."""
        host.run(*words, env=self.environment, cwd=self.folder, timeout=60)

    def run(self, *words: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command on the head."""
        return self.hosts[0].run(*words, env=self.environment, cwd=cwd or self.folder, check=check)

    def idle(self) -> int:
        """How many nodes are idle."""
        done = self.run("sinfo", "--noheader", "--states=idle", "--format=%D", check=False)
        return int(done.stdout.strip() or 0) if done.stdout.strip().isdecimal() else 0

    def submit(self, *words: object, cwd: Path) -> int:
        """`sbatch`; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd).stdout.strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for_array(self, number: int, seconds: float = 300.0) -> list[str]:
        """The state of each task of an array, once all have ended."""

        def ended() -> list[str] | None:
            lines = self.run("scontrol", "-o", "show", "job", number).stdout.splitlines()
            states = [dict(pair.split("=", 1) for pair in line.split() if "=" in pair)["JobState"] for line in lines]
            return states if states and all(state in ENDED for state in states) else None

        return wait_until(ended, f"array {number}", seconds)

    def wait(self, number: int, seconds: float = 300.0, **wanted: Any) -> dict[str, str]:
        """The job, once it has ended (or once its fields are as `wanted`)."""

        def arrived() -> dict[str, str] | None:
            job = self.job(number)
            if wanted:
                return job if all(job.get(key) == value for key, value in wanted.items()) else None
            return job if job["JobState"] in ENDED else None

        return wait_until(arrived, f"job {number} is {self.job(number)}", seconds)
