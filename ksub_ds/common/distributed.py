"""The ranks of a run: start together, add up and agree, end together.

A rank that fails alone leaves the others waiting in their next collective. So whatever the user may have
got wrong runs under `raise_on_all_ranks`: when one rank raises, all do. Failures that raise nothing (a
killed process, a cut network, a rank that hangs) are left to the `Watchdog`, which is started here:

    KSUB_TIMEOUT_SECONDS    a rank without progress for so long hangs; a collective times out after it [600]
    KSUB_SILENCE_SECONDS    a rank without a heartbeat for so long is lost [60]

The ranks meet at MASTER_ADDR:MASTER_PORT, in torch's TCPStore.
"""

import atexit
import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ksub_ds.common.errors import UserError, describe_os_error
from ksub_ds.common.logging import get_logger
from ksub_ds.common.rank_env import (
    RankInfo,
    device,
    env_integer,
    has_gpu,
    is_main,
    rank_info,
    rank_variables,
    told_by,
    world_size,
)
from ksub_ds.common.rank_env import local_rank as local_rank  # callers find all about ranks in this module
from ksub_ds.common.rank_env import rank as rank
from ksub_ds.common.watchdog import Watchdog, connector

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_SECONDS = 600
SILENCE_SECONDS = 60
NOTICE_SECONDS = 5  # of silent waiting at the rendezvous, before a line says for whom
BACKEND_GRACE_SECONDS = 30  # torch's own timeout comes later than ours, which names the rank
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
Result = TypeVar("Result")
_watchdog: Watchdog | None = None
_had_peers = False  # whether this process has been one of several ranks


def watchdog() -> Watchdog | None:
    """Return this rank's watchdog, once `init_distributed` has started it."""
    return _watchdog


def mark_progress(where: str | None = None) -> None:
    """Tell the watchdog that this rank has reached the next point that all ranks reach.

    Args:
        where: the point, for the message about a rank that hangs. [the last one given]
    """
    if _watchdog is not None:
        _watchdog.mark_progress(where)


# ------------------------------------------------------------ start


def init_distributed() -> RankInfo:
    """Start the process group (nccl on GPUs, gloo otherwise) and the watchdog; safe to call twice.

    Returns:
        This rank's place among all.

    Raises:
        UserError: the environment names ranks but no address to meet at (MASTER_ADDR), its port is taken, or a host
            has more ranks than GPUs, or none where others have some.
        RuntimeError: not all ranks came in time; the missing ones are named.
    """
    global _watchdog, _had_peers
    import torch.distributed as dist

    info = rank_info()
    if dist.is_available() and dist.is_initialized():
        return info
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _share_cores(info)
    # DeepSpeed's cache of compiled operators is shared by all environments of a user, which then
    # rebuild each other's files.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))  # noqa: PTH118
    variables = rank_variables()  # as the launcher left them
    set_rendezvous_address(info)
    if has_gpu():
        _bind_gpu(info)

    import deepspeed
    import deepspeed.ops

    if not has_gpu():
        # 40 s of g++ at the first start, for an operator that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = env_integer("KSUB_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    timeout = timedelta(seconds=patience + BACKEND_GRACE_SECONDS)
    # DeepSpeed makes its data-parallel group without a timeout, so the default has to change as well.
    dist.distributed_c10d.default_pg_timeout = timeout
    if info.world_size > 1:
        _had_peers = True
        _watchdog = rendezvous(info, patience, timeout, variables)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if info.world_size == 1:
        _watchdog = Watchdog(0, [socket.gethostname()])
    return info


def _bind_gpu(info: RankInfo) -> None:
    """Choose this rank's GPU among those it sees, before anything starts on one.

    Where each rank sees one GPU only (SLURM's --gpus-per-task, CUDA_VISIBLE_DEVICES), it is number 0 on every rank.
    """
    import torch

    index = info.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    # DeepSpeed takes LOCAL_RANK for the number of the GPU, and under mpirun compares it with mpirun's.
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    os.environ.update({name: str(index) for name in names if name in os.environ})


def _share_cores(info: RankInfo) -> None:
    """Give each rank of this machine its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and info.local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_size))


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def set_rendezvous_address(info: RankInfo) -> None:
    """Set RANK ... MASTER_PORT, which torch reads, where the launcher left them out.

    Raises:
        UserError: several ranks and no MASTER_ADDR, or fewer processes than the variables say.
    """
    environment, variables = os.environ, rank_variables()
    if info.world_size == 1:
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif "MASTER_ADDR" not in environment and "OMPI_COMM_WORLD_SIZE" in environment:
        from mpi4py import MPI

        communicator = MPI.COMM_WORLD
        if communicator.Get_size() == 1:
            message = f"MPI connects 1 process, not {info.world_size}: {told_by(variables)}"
            _tell_every_rank(info, message)
            raise UserError(message)
        environment["MASTER_ADDR"] = communicator.bcast(socket.gethostbyname(socket.gethostname()), root=0)
    elif "MASTER_ADDR" not in environment and env_integer("SLURM_STEP_NUM_NODES", 0) == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_ADDR" not in environment:
        message = (
            f"MASTER_ADDR is not set, but this is rank {info.rank} of {info.world_size}: {told_by(variables)}; "
            "else export MASTER_ADDR=<name or address of the first host>"
        )
        _tell_every_rank(info, message)
        raise UserError(message)
    job = environment.get("SLURM_JOB_ID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(job) % 20000) if job != "0" else "29500")
    environment.update(RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.world_size))


def _tell_every_rank(info: RankInfo, message: str) -> None:
    """Print an error on all ranks but the first, which prints it anyway: with left-over variables there is no first."""
    if info.rank > 0:
        print(f"error: {message}", file=sys.stderr)


def rendezvous(info: RankInfo, patience: float, timeout: timedelta, variables: dict[str, str]) -> Watchdog:
    """Wait for all ranks at rank 0's store, start the watchdog, then torch's process group.

    A wait of some seconds says for whom, where, and which variables told it so.

    Args:
        info: this rank among several.
        patience: seconds to wait for the others.
        timeout: after which torch's collectives give up.
        variables: those of the launcher that say that there are others.

    Returns:
        The running watchdog.

    Raises:
        UserError: the port is taken, two ranks have the same GPU, or only some have one.
        RuntimeError: not all ranks came in time; the missing ones are named.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], env_integer("MASTER_PORT")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def say(missing: list[int]) -> None:
        ranks = ", ".join(map(str, missing))
        get_logger().warning(
            f"rank {info.rank} of {info.world_size} waits for rank {ranks} at {address}:{port}, "
            f"up to {patience:.0f} s: {told_by(variables)}"
        )

    store = _open_store(address, port, info, patience, say)
    store.set(f"ksub/{attempt}/here/{info.rank}", f"{socket.gethostname()} {_gpu_id()}")
    keys = [f"ksub/{attempt}/here/{rank}" for rank in range(info.world_size)]
    missing = _wait_for_keys(store, keys, patience, say if info.rank == 0 else None)
    if missing:
        came_not = ", ".join(map(str, missing))
        raise RuntimeError(f"rank {came_not} did not come to {address}:{port} in {patience} s")
    places = [place.decode() for place in store.multi_get(keys)]
    if problem := wrong_gpus(places):
        _leave_together(store, f"ksub/{attempt}/refused", info)
        raise UserError(problem, agreed=True)
    hosts = [place.split()[0] for place in places]
    silence = env_integer("KSUB_SILENCE_SECONDS", SILENCE_SECONDS)
    connect = connector(address, port, f"ksub/{attempt}", timedelta(seconds=silence))
    watchdog = Watchdog(info.rank, hosts, connect, patience, silence)
    backend, own_device = ("nccl", device()) if has_gpu() else ("gloo", None)
    group_store = dist.PrefixStore(f"group/{attempt}", store)
    dist.init_process_group(
        backend, store=group_store, rank=info.rank, world_size=info.world_size, timeout=timeout, device_id=own_device
    )
    return watchdog


def _open_store(address: str, port: int, info: RankInfo, patience: float, say: Callable[[list[int]], None]) -> Any:
    """Serve rank 0's store, or connect to it within `patience` seconds; `say` is called if that takes some seconds.

    Raises:
        UserError: the port is taken.
        RuntimeError: rank 0 did not answer in time.
    """
    import torch.distributed as dist

    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, for all attempts
    serves = info.rank == 0 and not served
    # One rank of each machine speaks first. The others follow, for theirs may be left-over variables too.
    notice = threading.Timer(NOTICE_SECONDS * (1 if info.local_rank == 0 else 3), say, [[0]])
    notice.daemon = True
    notice.start()
    try:
        return dist.TCPStore(
            address, port, is_master=serves, timeout=timedelta(seconds=patience), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if serves and "EADDRINUSE" in str(error):
            raise UserError(f"MASTER_PORT {port} is taken on {address}; export another MASTER_PORT") from None
        raise RuntimeError(f"no answer from rank 0 at {address}:{port} for {patience} s") from None
    finally:
        notice.cancel()


def _wait_for_keys(store: Any, keys: list[str], patience: float, say: Callable[[list[int]], None] | None) -> list[int]:
    """Wait until all keys are in the store, and return the numbers of those that are not after `patience` seconds.

    Args:
        store: the store.
        keys: one of each rank.
        patience: seconds.
        say: called once with what is missing, if that takes some seconds; None for a rank that stays silent.
    """
    begun = time.monotonic()
    while not store.check(keys):
        waited = time.monotonic() - begun
        if waited > patience:
            return [rank for rank, key in enumerate(keys) if not store.check([key])]
        if say is not None and waited > NOTICE_SECONDS:
            say([rank for rank, key in enumerate(keys) if not store.check([key])])
            say = None  # once
        time.sleep(0.02)
    return []


def _gpu_id() -> str:
    """Return what tells this rank's GPU from every other one; nothing on a CPU."""
    if not has_gpu():
        return ""
    import torch

    return str(torch.cuda.get_device_properties(device()).uuid)


def wrong_gpus(places: list[str]) -> str | None:
    """Return what is wrong where two ranks have the same GPU, or only some have one; None where all have, or none.

    Args:
        places: of each rank, its host and the id of its GPU, if it has one.
    """
    with_gpu = [place for place in places if len(place.split()) == 2]
    if 0 < len(with_gpu) < len(places):  # they would wait for each other, in nccl and in gloo
        hosts = ", ".join(dict.fromkeys(place.strip() for place in places if place not in with_gpu))
        return f"ranks without a GPU on {hosts}, others have one: check nvidia-smi there, or export DS_ACCELERATOR=cpu"
    twice = next((place for place in with_gpu if with_gpu.count(place) > 1), None)
    if twice is None:
        return None
    host = twice.split()[0]
    ranks = [rank for rank, place in enumerate(places) if place.split()[0] == host]
    gpus = len({places[rank] for rank in ranks})
    return (
        f"{host} has {len(ranks)} ranks ({', '.join(map(str, ranks))}) and {gpus} GPU{'s' * (gpus > 1)} for them; "
        f"start {gpus} rank{'s' * (gpus > 1)} there (slots in the hostfile, --nproc-per-node, --ntasks-per-node)"
    )


def _leave_together(store: Any, key: str, info: RankInfo) -> None:
    """Have rank 0, which serves the store, wait until all others have read it."""
    store.set(f"{key}/{info.rank}", "")
    if info.rank == 0:
        with contextlib.suppress(RuntimeError):  # a rank that died meanwhile needs no answer
            store.wait([f"{key}/{rank}" for rank in range(info.world_size)], timedelta(seconds=NOTICE_SECONDS))


# ------------------------------------------------------------ add up and agree


class NumbersToRead:
    """A tensor of a few numbers that the host reads later.

    On a GPU they are copied to the host as soon as they are computed, so that reading them waits for no work that
    was queued after them.

    Args:
        numbers: one-dimensional.
    """

    def __init__(self, numbers: "Tensor"):
        self._numbers, self._arrival = numbers, None
        if numbers.is_cuda:
            import torch

            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> list[float]:
        """Return the numbers. On a GPU this waits until they are computed, collectives included."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()


def to_device(values: list[float]) -> "Tensor":
    """Return a few numbers as a float64 tensor on this rank's device, without waiting for it."""
    import torch

    return torch.tensor(values, dtype=torch.float64, pin_memory=has_gpu()).to(device(), non_blocking=True)


def sum_over_ranks(tensor: "Tensor") -> "Tensor":
    """Overwrite a tensor by its sum over all ranks, without waiting for the device, and return it."""
    if world_size() > 1:
        import torch.distributed as dist

        mark_progress()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sum a few numbers over all ranks in float64 (counts stay exact up to 2^53)."""
    if world_size() == 1:
        return [float(value) for value in values]
    return NumbersToRead(sum_over_ranks(to_device(values))).read()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    mark_progress()
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(tensor: "Tensor") -> None:
    """Overwrite `tensor` with rank 0's, on every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        mark_progress()
        dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    mark_progress()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank; when it fails on any, every rank raises the error of the lowest such rank.

    All ranks must call this at the same point.

    Raises:
        UserError: `function` raised it on any rank, or met a disk that is full or may not be written.
        OSError: any other one that `function` raised on this rank.
    """
    problem, result = None, None
    try:
        result = function()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        problem = describe_os_error(error)
    problems = gather_objects(problem)
    for failed_rank, text in enumerate(problems):
        if text is not None:
            raise_agreed(text if failed_rank == 0 else f"{text} (on rank {failed_rank})")
    return result  # type: ignore[return-value]  # no problem anywhere: function() returned


def raise_agreed(text: str) -> NoReturn:
    """Raise an error that every rank raises at this point, so that rank 0 alone prints it.

    Raises:
        UserError: always.
    """
    raise UserError(text, agreed=True)


def on_main(function: Callable[[], Result]) -> Result | None:
    """Call `function` on rank 0 only and return its result there; its UserError is raised on every rank."""
    return raise_on_all_ranks(lambda: function() if is_main() else None)


# ------------------------------------------------------------ end


def shutdown() -> None:
    """Stop the watchdog and leave the process group, if there is one."""
    global _watchdog
    import torch.distributed as dist

    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
    if dist.is_available() and dist.is_initialized():
        comm = sys.modules.get("deepspeed.comm.comm")
        # DeepSpeed keeps the groups it has made, and would use them again in this process's next run.
        (dist if comm is None or comm.cdb is None else comm).destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after `shutdown`.

    One rank of several does not unwind the interpreter: a thread of torch or gloo that still works in C++ would
    abort a run that is finished ("terminate called without an active exception", now and then on a busy machine).
    """
    if not _had_peers:
        sys.exit(code)
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
