"""Who am I among the processes of this run, as the variables of its launcher say? (Where they meet: meeting.py.)

deepspeed / torchrun    RANK, LOCAL_RANK, WORLD_SIZE
srun                    SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS (inside a job step only)
mpirun                  OMPI_COMM_WORLD_RANK, _LOCAL_RANK, _SIZE
nothing                 one process
"""

import os
from typing import Any, NamedTuple

from ksub_ds.common.errors import UserError


class RankInfo(NamedTuple):
    """Where this process stands."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int  # processes on this machine; 0 when nobody says


def integer(name: str, default: int | None = None) -> int:
    """A number from the environment.

    Raises:
        UserError: it is set to something else, or not set and there is no default.
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
    """Read rank and world size from the launcher's environment, without starting anything."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local_size = integer("LOCAL_WORLD_SIZE", integer("LOCAL_SIZE", 0))
        return RankInfo(integer("RANK"), integer("LOCAL_RANK", 0), integer("WORLD_SIZE"), local_size)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
        return RankInfo(*(integer(f"OMPI_COMM_WORLD_{name}") for name in names))
    # A batch script's own shell has SLURM_PROCID too, but no step: there the command is one process.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return RankInfo(integer("SLURM_PROCID"), integer("SLURM_LOCALID"), integer("SLURM_STEP_NUM_TASKS"), 0)
    return RankInfo(0, 0, 1, 1)


def rank() -> int:
    """Index of this process among all, from 0."""
    return rank_info().rank


def local_rank() -> int:
    """Index of this process on its machine, from 0: the GPU it uses."""
    return rank_info().local_rank


def world_size() -> int:
    """How many processes the run has."""
    return rank_info().world_size


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and prints."""
    return rank() == 0


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device() -> Any:
    """The torch device of this process."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def has_mpi() -> bool:
    """Whether mpirun or srun started several processes, and so MPI can join them."""
    by_srun = "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ
    return world_size() > 1 and ("OMPI_COMM_WORLD_SIZE" in os.environ or by_srun)
