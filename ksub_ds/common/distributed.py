"""Ranks: who am I among the processes of this run, and how do we agree?

The only file that reads RANK, SLURM_* and OMPI_*, and the home of mpi4py. Four ways to be started:

    deepspeed / torchrun    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    srun                    SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS (inside a job step only)
    mpirun                  OMPI_COMM_WORLD_RANK, _LOCAL_RANK, _SIZE
    nothing                 one process

A rank that fails alone leaves the others waiting in their next reduction. So whatever can go wrong
for the user runs under `in_agreement`: every rank raises when one does. What goes wrong without a
word (a killed process, a cut network, a rank that hangs) is the `Watchdog`'s, started here:

    KSUB_TIMEOUT_SECONDS    a rank that stands still for so long hangs; a collective ends after it [600]
    KSUB_SILENCE_SECONDS    a rank without a sign of life for so long is lost [60]
"""

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

from ksub_ds.common.errors import UserError
from ksub_ds.common.watchdog import Watchdog, connector

TIMEOUT_SECONDS, SILENCE_SECONDS = 600, 60
BACKEND_GRACE_SECONDS = 30  # torch's own timeout comes later than ours, which names the rank
Result = TypeVar("Result")
_watchdog: Watchdog | None = None
_met = False  # whether this process was one of several ranks


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int  # processes on this machine; 0 when nobody says


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(
            f"environment variable {name}: {text!r} is not a number; unset it or start with a launcher"
        ) from None


def place() -> Place:
    """Read rank and world size from the launcher's environment, without starting anything."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local_size = _integer("LOCAL_WORLD_SIZE", _integer("LOCAL_SIZE", 0))
        return Place(_integer("RANK"), _integer("LOCAL_RANK", 0), _integer("WORLD_SIZE"), local_size)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
        return Place(*(_integer(f"OMPI_COMM_WORLD_{name}") for name in names))
    # A batch script's own shell has SLURM_PROCID too, but no step: there the command is one process.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return Place(_integer("SLURM_PROCID"), _integer("SLURM_LOCALID"), _integer("SLURM_STEP_NUM_TASKS"), 0)
    return Place(0, 0, 1, 1)


def rank() -> int:
    """Index of this process among all, from 0."""
    return place().rank


def local_rank() -> int:
    """Index of this process on its machine, from 0: the GPU it uses."""
    return place().local_rank


def world_size() -> int:
    """How many processes the run has."""
    return place().world_size


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


def watchdog() -> Watchdog | None:
    """This rank's watchdog, once `init_distributed` has started it."""
    return _watchdog


def arrive(where: str | None = None) -> None:
    """Tell the watchdog that this rank has come to the next point that all ranks come to."""
    if _watchdog is not None:
        _watchdog.arrive(where)


def init_distributed() -> Place:
    """Start the process group (nccl on GPUs, gloo otherwise) and the watchdog; safe to call twice.

    Raises:
        UserError: the environment names ranks but no place to meet (MASTER_ADDR), or its port is taken.
        RuntimeError: not all ranks came in time; those that are missing are named.
    """
    global _watchdog
    import torch
    import torch.distributed as dist

    here = place()
    if dist.is_available() and dist.is_initialized():
        return here
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_cores(here)
    # DeepSpeed's cache of compiled operators is shared by all environments of a user, which then
    # rebuild each other's files.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))  # noqa: PTH118
    if has_gpu():
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    _set_meeting_point(here)

    import deepspeed
    import deepspeed.ops

    if not has_gpu():
        # 40 s of g++ at the first start, for an operator that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = _integer("KSUB_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    timeout = timedelta(seconds=patience + BACKEND_GRACE_SECONDS)
    # DeepSpeed makes its data-parallel group without a timeout, so the default has to change as well.
    dist.distributed_c10d.default_pg_timeout = timeout
    if here.world_size > 1:
        _meet(here, patience, timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if here.world_size == 1:
        _watchdog = Watchdog(0, [socket.gethostname()])
    return here


def _meet(here: Place, patience: float, timeout: timedelta) -> None:
    """Wait for all ranks at rank 0's store, start the watchdog, then torch's process group."""
    global _watchdog, _met
    import torch.distributed as dist

    _met = True
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, for all attempts
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    serves = here.rank == 0 and not served
    try:
        store = dist.TCPStore(
            address, port, is_master=serves, timeout=timedelta(seconds=patience), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if serves and "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port} is taken on {address}; export another MASTER_PORT") from None
        raise RuntimeError(f"no answer from rank 0 at {address}:{port} for {patience} s") from None
    store.set(f"ksub/{attempt}/here/{here.rank}", socket.gethostname())
    deadline = time.monotonic() + patience
    keys = [f"ksub/{attempt}/here/{rank}" for rank in range(here.world_size)]
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(f"rank {', '.join(map(str, missing))} did not come to {address}:{port} in {patience} s")
        time.sleep(0.02)
    hosts = [host.decode() for host in store.multi_get(keys)]
    silence = _integer("KSUB_SILENCE_SECONDS", SILENCE_SECONDS)
    connect = connector(address, port, f"ksub/{attempt}", timedelta(seconds=silence))
    _watchdog = Watchdog(here.rank, hosts, connect, patience, silence)
    backend = "nccl" if has_gpu() else "gloo"
    group_store = dist.PrefixStore(f"group/{attempt}", store)
    dist.init_process_group(backend, store=group_store, rank=here.rank, world_size=here.world_size, timeout=timeout)


def _share_cores(here: Place) -> None:
    """Give each rank of this machine its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and here.local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))


def _set_meeting_point(here: Place) -> None:
    """Fill in RANK ... MASTER_PORT, which torch reads, when the launcher left them out."""
    environment = os.environ
    if here.world_size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif "MASTER_ADDR" not in environment and "OMPI_COMM_WORLD_SIZE" in environment:
        from mpi4py import MPI

        communicator = MPI.COMM_WORLD
        environment["MASTER_ADDR"] = communicator.bcast(socket.gethostbyname(socket.gethostname()), root=0)
    elif "MASTER_ADDR" not in environment and _integer("SLURM_STEP_NUM_NODES", 0) == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"MASTER_ADDR is not set, but this is rank {here.rank} of {here.world_size}; "
            "export MASTER_ADDR=<name or address of the first host>"
        )
    job = environment.get("SLURM_JOB_ID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(job) % 20000) if job != "0" else "29500")
    environment.update(RANK=str(here.rank), LOCAL_RANK=str(here.local_rank), WORLD_SIZE=str(here.world_size))


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sum a few numbers over all ranks in float64 (counts stay exact up to 2^53)."""
    if world_size() == 1:
        return [float(value) for value in values]
    import torch
    import torch.distributed as dist

    arrive()
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    arrive()
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(tensor: Any) -> None:
    """Overwrite `tensor` with rank 0's, on every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        arrive()
        dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    arrive()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def in_agreement(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank; when any rank meets a UserError, every rank raises it.

    All ranks must call this at the same point. The lowest failing rank's message wins.
    """
    problem, result = None, None
    try:
        result = function()
    except UserError as error:
        problem = str(error)
    problems = gather_objects(problem)
    for failed_rank, text in enumerate(problems):
        if text is not None:
            all_raise(text if failed_rank == 0 else f"{text} (on rank {failed_rank})")
    return result  # type: ignore[return-value]  # no problem anywhere: function() returned


def all_raise(text: str) -> NoReturn:
    """Raise a UserError that every rank raises at this point; rank 0 alone will print it."""
    error = UserError(text)
    error.agreed = True
    raise error


def on_main(function: Callable[[], Result]) -> Result | None:
    """Call `function` on rank 0 only (None elsewhere); its UserError is raised on every rank."""
    return in_agreement(lambda: function() if is_main() else None)


def mpi_communicator() -> Any:
    """MPI's world of processes where mpirun or srun started several, else None: for work without a process group.

    Raises:
        UserError: several processes were started, but with no MPI between them.
    """
    environment = os.environ
    by_srun = "SLURM_STEP_NUM_TASKS" in environment and "RANK" not in environment
    if world_size() == 1 or not ("OMPI_COMM_WORLD_SIZE" in environment or by_srun):
        return None
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() != world_size():
        raise UserError(
            f"{world_size()} processes were started, but MPI sees {MPI.COMM_WORLD.Get_size()}; start them with "
            "mpirun, or with srun --mpi=pmix (srun --mpi=list tells what this machine has)"
        )
    return MPI.COMM_WORLD


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _watchdog
    import torch.distributed as dist

    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after `shutdown`.

    A rank among several does not unwind the interpreter: a thread of torch or gloo that is still at work in C++ would
    abort a run that is through ("terminate called without an active exception", now and then on a busy machine).
    """
    if not _met:
        sys.exit(code)
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
