"""`ksub submit`: submit one of our jobs to SLURM, with the sbatch line that one would type.

ksub submit --dry-run --nodes 4 --time 12:00:00 -- --preset tiny --codes codes.safetensors --data shards --out run
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ksub_ds.cluster.remote import ROOT
from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse

# As sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
ARRAY = re.compile(r"\d+(-\d+)?(:\d+)?(,\d+(-\d+)?(:\d+)?)*(%\d+)?")


@dataclass(frozen=True)
class Submit:
    """Submit a job to SLURM.

    What follows `--` goes to the job: `ksub pretrain`'s options, and --max-restarts N; for --job evaluate those of
    `ksub evaluate`, for shard_cc those of preprocessing/shard_cc.py.
    """

    job: Literal["pretrain", "evaluate", "shard_cc"] = "pretrain"
    """Which script of launch/."""
    nodes: int | None = None
    """Nodes. [the script's: 1]"""
    ntasks_per_node: int | None = None
    """Ranks on each node: one per GPU. [--gpus-per-node, else the script's]"""
    gpus_per_node: int | None = None
    """GPUs on each node. [none requested]"""
    cpus_per_task: int | None = None
    """Cores for each rank. [SLURM's default]"""
    time: str | None = None
    """Time limit of one start, as sbatch takes it: 12:00:00, 2-00:00:00. A pretraining that needs longer is
    requeued and resumes. [the partition's]"""
    array: str | None = None
    """Array of workers, for --job evaluate: 0-15. [the script's: 0-3]"""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    job_name: str | None = None
    """Name in the queue. [the script's]"""
    dry_run: bool = False
    """Print the sbatch line, submit nothing."""

    @property
    def ranks(self) -> int:
        """Number of tasks on all nodes."""
        return (self.nodes or 1) * (self.ntasks_per_node or self.gpus_per_node or 1)


def command_line(settings: Submit, arguments: Sequence[str]) -> list[str]:
    """Return the words of the sbatch line.

    Args:
        settings: those of `ksub submit`.
        arguments: the words behind `--`, for the job.

    Raises:
        UserError: a value that sbatch would refuse, or an array for a job that is not an array.
    """
    for name in ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    for name in ("partition", "account", "job_name"):
        value = getattr(settings, name)
        if value is not None and not (value.strip() and value.isprintable()):
            raise UserError(f"--{name.replace('_', '-')} {value!r}: is empty; give a name, or leave it out")
    if settings.time is not None and not TIME.fullmatch(settings.time):
        raise UserError(f"--time {settings.time}: write hours:minutes:seconds, such as 12:00:00, or 2-00:00:00")
    if settings.array is not None and not ARRAY.fullmatch(settings.array):
        raise UserError(f"--array {settings.array}: write a range such as 0-15")
    for first, last in re.findall(r"(\d+)-(\d+)", settings.array or ""):
        if int(first) > int(last):
            raise UserError(f"--array {settings.array}: {first}-{last} runs backwards; write {last}-{first}")
    if settings.array is not None and settings.job != "evaluate":
        raise UserError(f"--array {settings.array}: {settings.job} is one job, not an array; only evaluate is")
    if settings.job == "pretrain" and not any(word == "--out" or word.startswith("--out=") for word in arguments):
        raise UserError("--out is missing behind `--`: name the run folder, through which the job is asked to stop")
    values = {
        "nodes": settings.nodes,
        "ntasks-per-node": settings.ntasks_per_node or settings.gpus_per_node,
        "gpus-per-node": settings.gpus_per_node,
        "cpus-per-task": settings.cpus_per_task,
        "time": settings.time,
        "array": settings.array,
        "partition": settings.partition,
        "account": settings.account,
        "job-name": settings.job_name,
    }
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return ["sbatch", *words, str(ROOT / "launch" / f"{settings.job}.sbatch"), *arguments]


def without_restarts(arguments: Sequence[str]) -> list[str]:
    """Return the trainer's options: launch/pretrain.sbatch keeps --max-restarts N to itself.

    Raises:
        UserError: N is not a whole number.
    """
    left: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--max-restarts":
            left.append(word)
        elif not (value if equals else (value := next(words, "without a value"))).isdecimal():
            raise UserError(f"--max-restarts {value}: must be a whole number, 0 or more")
    return left


def check_job(settings: Submit, arguments: list[str]) -> None:
    """Parse a job's options as the job will, and check what needs no file: mistakes show now, not hours later.

    Args:
        settings: those of `ksub submit`.
        arguments: the words behind `--`, for the job.
    """
    if settings.job == "pretrain":
        from ksub_ds.pretrain.engine import find_deepspeed_config
        from ksub_ds.pretrain.recipe import parse_recipe, resolve

        find_deepspeed_config(resolve(parse_recipe(arguments), settings.ranks, on_gpu=True).deepspeed)
    elif settings.job == "evaluate":
        from ksub_ds.evaluate.__main__ import parse_settings

        parse_settings(arguments)
    else:
        from ksub_ds.corpus.commoncrawl.config import ShardCC, check

        check(parse(ShardCC, arguments, "preprocessing/shard_cc.py"))


def submit(arguments: Sequence[str]) -> int:
    """Parse the command line, and the job's as the job will, then print or run the sbatch line.

    Args:
        arguments: the words behind `ksub submit`.

    Returns:
        The exit code of sbatch.

    Raises:
        UserError: a value that sbatch or the job would refuse.
    """
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    settings = parse(Submit, arguments[:cut], "ksub submit")
    behind = list(arguments[cut + 1 :])
    words = command_line(settings, behind)
    own = without_restarts(behind) if settings.job == "pretrain" else behind
    try:
        check_job(settings, own)
    except UserError as error:
        raise UserError(f"{settings.job}: {error}") from None
    if settings.dry_run:
        print(shlex.join(words))
        return 0
    if not Path(words[len(words) - len(behind) - 1]).is_file():
        raise UserError(f"{ROOT / 'launch'}: the scripts are not installed; submit from a checkout of the project")
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here; submit on a login node of the cluster, or see --dry-run")
    return subprocess.run(words, stdout=sys.stdout, stderr=sys.stderr).returncode
