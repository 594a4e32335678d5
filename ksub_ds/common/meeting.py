"""Where the ranks of a run find each other: an address, a store there, and the watchdog over it."""

import os
import socket
import time
from datetime import timedelta

from ksub_ds.common.errors import UserError
from ksub_ds.common.place import Place, has_gpu, integer
from ksub_ds.common.watchdog import Watchdog, connector

SILENCE_SECONDS = 60


def set_meeting_point(here: Place) -> None:
    """Fill in RANK ... MASTER_PORT, which torch reads, when the launcher left them out.

    Raises:
        UserError: several ranks and no MASTER_ADDR.
    """
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
    elif "MASTER_ADDR" not in environment and integer("SLURM_STEP_NUM_NODES", 0) == 1:
        environment["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"MASTER_ADDR is not set, but this is rank {here.rank} of {here.world_size}; "
            "export MASTER_ADDR=<name or address of the first host>"
        )
    job = environment.get("SLURM_JOB_ID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(job) % 20000) if job != "0" else "29500")
    environment.update(RANK=str(here.rank), LOCAL_RANK=str(here.local_rank), WORLD_SIZE=str(here.world_size))


def meet(here: Place, patience: float, timeout: timedelta) -> Watchdog:
    """Wait for all ranks at rank 0's store, start the watchdog and give it back, then torch's process group.

    Args:
        here: this rank's place among several.
        patience: seconds to wait for the others.
        timeout: after which torch's collectives give up.

    Raises:
        UserError: the port is taken.
        RuntimeError: not all ranks came in time; those that are missing are named.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], integer("MASTER_PORT")
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
    silence = integer("KSUB_SILENCE_SECONDS", SILENCE_SECONDS)
    connect = connector(address, port, f"ksub/{attempt}", timedelta(seconds=silence))
    watchdog = Watchdog(here.rank, hosts, connect, patience, silence)
    backend = "nccl" if has_gpu() else "gloo"
    group_store = dist.PrefixStore(f"group/{attempt}", store)
    dist.init_process_group(backend, store=group_store, rank=here.rank, world_size=here.world_size, timeout=timeout)
    return watchdog
