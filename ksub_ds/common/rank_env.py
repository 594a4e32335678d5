"""Which rank this process is and how many there are, as the launcher's variables say.

deepspeed / torchrun    RANK, LOCAL_RANK, WORLD_SIZE
srun                    SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS (inside a job step only)
mpirun                  OMPI_COMM_WORLD_RANK, _LOCAL_RANK, _SIZE
nothing                 one process

Where the ranks meet is distributed.py's: `set_rendezvous_address`.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

from ksub_ds.common.errors import UserError

if TYPE_CHECKING:
    import torch

# What launchers, DeepSpeed's and torchrun's among them, set for one process: not for those that it starts.
OF_ONE_PROCESS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


class RankInfo(NamedTuple):
    """The place of this process among those of the run.

    Attributes:
        rank: index among all processes, from 0.
        local_rank: index among the processes of this machine, from 0.
        world_size: number of processes.
        local_size: number of processes on this machine; 0 if the launcher does not say.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int


def env_integer(name: str, default: int | None = None) -> int:
    """Read a whole number from the environment.

    Raises:
        UserError: the variable is not a number, or is missing and has no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(
            f"environment variable {name}: {text!r} is not a number; unset it or start with a launcher"
        ) from None


def rank_info() -> RankInfo:
    """Read rank and world size from the launcher's environment, without starting anything.

    Raises:
        UserError: a variable of the launcher is not a number, or says of no place in the run.
    """
    info = _read_ranks()
    if not 0 <= info.rank < info.world_size:
        variables = rank_variables()
        values = " ".join(f"{name}={value}" for name, value in variables.items())
        raise UserError(
            f"{values}: a rank is at least 0 and below the number of ranks; unset {' '.join(variables)}, or start with "
            "a launcher"
        )
    return info


def _read_ranks() -> RankInfo:
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local_size = env_integer("LOCAL_WORLD_SIZE", env_integer("LOCAL_SIZE", 0))
        return RankInfo(env_integer("RANK"), env_integer("LOCAL_RANK", 0), env_integer("WORLD_SIZE"), local_size)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
        return RankInfo(*(env_integer(f"OMPI_COMM_WORLD_{name}") for name in names))
    # A batch script's own shell has SLURM_PROCID too, but no step: there the command is one process.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        tasks = env_integer("SLURM_STEP_NUM_TASKS")
        return RankInfo(env_integer("SLURM_PROCID"), env_integer("SLURM_LOCALID"), tasks, 0)
    return RankInfo(0, 0, 1, 1)


def rank_variables() -> dict[str, str]:
    """Return the environment variables that `rank_info` goes by, with their values; none for one process."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ["RANK", "WORLD_SIZE"]
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]
    else:
        names = []
    return {name: environment[name] for name in names}


def told_by(variables: dict[str, str]) -> str:
    """Return which variables say that there are several ranks, and what to do where that is not so."""
    values = " ".join(f"{name}={value}" for name, value in variables.items())
    return f"{values} in the environment say so; if you started one process alone: unset {' '.join(variables)}"


def rank() -> int:
    """Return the index of this process among all, from 0."""
    return rank_info().rank


def local_rank() -> int:
    """Return the index of this process on its machine, from 0: the GPU it uses."""
    return rank_info().local_rank


def world_size() -> int:
    """Return the number of processes of the run."""
    return rank_info().world_size


def is_main() -> bool:
    """Return whether this is rank 0, the one that writes and prints."""
    return rank() == 0


def has_gpu() -> bool:
    """Return whether this process computes on a GPU."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device() -> "torch.device":
    """Return the torch device of this process."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def has_mpi() -> bool:
    """Return whether mpirun or srun started several processes, so that MPI can join them."""
    by_srun = "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ
    return world_size() > 1 and ("OMPI_COMM_WORLD_SIZE" in os.environ or by_srun)
