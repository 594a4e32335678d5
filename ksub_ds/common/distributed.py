"""The ranks of a run: start together, add up and agree, end together.

A rank that fails alone leaves the others waiting in their next reduction. So whatever can go wrong
for the user runs under `in_agreement`: every rank raises when one does. What goes wrong without a
word (a killed process, a cut network, a rank that hangs) is the `Watchdog`'s, started here:

    KSUB_TIMEOUT_SECONDS    a rank that stands still for so long hangs; a collective ends after it [600]
    KSUB_SILENCE_SECONDS    a rank without a sign of life for so long is lost [60]
"""

import atexit
import errno
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from ksub_ds.common.errors import UserError
from ksub_ds.common.meeting import meet, set_meeting_point
from ksub_ds.common.place import Place, device, has_gpu, integer, is_main, place, world_size
from ksub_ds.common.place import local_rank as local_rank  # asked for here with the rest
from ksub_ds.common.place import rank as rank
from ksub_ds.common.watchdog import Watchdog

TIMEOUT_SECONDS = 600
BACKEND_GRACE_SECONDS = 30  # torch's own timeout comes later than ours, which names the rank
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
Result = TypeVar("Result")
_watchdog: Watchdog | None = None
_met = False  # whether this process was one of several ranks


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
    global _watchdog, _met
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
    set_meeting_point(here)

    import deepspeed
    import deepspeed.ops

    if not has_gpu():
        # 40 s of g++ at the first start, for an operator that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = integer("KSUB_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    timeout = timedelta(seconds=patience + BACKEND_GRACE_SECONDS)
    # DeepSpeed makes its data-parallel group without a timeout, so the default has to change as well.
    dist.distributed_c10d.default_pg_timeout = timeout
    if here.world_size > 1:
        _met = True
        _watchdog = meet(here, patience, timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if here.world_size == 1:
        _watchdog = Watchdog(0, [socket.gethostname()])
    return here


def _share_cores(here: Place) -> None:
    """Give each rank of this machine its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and here.local_size > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here.local_size))


def to_number(tensor: Any) -> float:
    """The value of a tensor of one number. On a GPU this waits for all that is queued, collectives among it."""
    return float(tensor.item())


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

    All ranks must call this at the same point. The lowest failing rank's message wins. A full disk, or one that may
    not be written, is the user's to mend as well.
    """
    problem, result = None, None
    try:
        result = function()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        problem = f"{error.filename or 'the disk'}: {error.strerror}; mend it, the same command continues"
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
