"""Divide work over MPI ranks, or do it in this process alone, with the same program.

    ranks = MPIComm()
    results = ranks.each("reading", sizes, lambda unit: ...)    # every unit once; all results on all ranks

A rank that raises a UserError tells the others, which stop after the unit they are at; then all ranks
raise it. Nobody waits for a rank that is gone: any other exception ends all processes, after its
traceback.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ksub_ds.common.errors import RESUME, UserError, describe_os_error
from ksub_ds.common.exit_codes import INTERRUPTED
from ksub_ds.common.rank_env import has_mpi, world_size

Result = TypeVar("Result")
_STOP = 77  # tag of the message "this rank has failed: stop before your next unit"


def mpi_communicator() -> Any:
    """Return MPI's world communicator where mpirun or srun started several processes, else None.

    Raises:
        UserError: several processes were started, but MPI does not connect them.
    """
    if not has_mpi():
        return None
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() != world_size():
        raise UserError(
            f"{world_size()} processes were started, but MPI sees {MPI.COMM_WORLD.Get_size()}; start them with "
            "mpirun, or with srun --mpi=pmix (srun --mpi=list shows what this machine has)",
            agreed=True,
        )
    return MPI.COMM_WORLD


def _describe(error: UserError | OSError) -> str:
    return describe_os_error(error) if isinstance(error, OSError) else str(error)


class MPIComm:
    """The processes of this run and what they exchange; a single process needs no MPI.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self._world = mpi_communicator()
        self.rank: int = 0 if self._world is None else self._world.Get_rank()
        self.size: int = 1 if self._world is None else self._world.Get_size()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Return every rank's value, in rank order, on every rank."""
        return [value] if self._world is None else self._world.allgather(value)

    def agree(self, function: Callable[[], Result]) -> Result:
        """Call `function` on every rank; when it fails on any, every rank raises the error of the lowest such rank.

        Raises:
            UserError: `function` raised it, or an OSError (a full disk, a folder that is gone), on any rank.
        """
        problem, result = None, None
        try:
            result = function()
        except (UserError, OSError) as error:
            problem = _describe(error)
        self.raise_on_all(problem)
        return result  # type: ignore[return-value]  # no problem anywhere: function() returned

    def raise_on_all(self, problem: str | None) -> None:
        """Raise an error on every rank when any rank has a problem.

        Raises:
            UserError: with the problem of the lowest rank that has one.
        """
        for failed, text in enumerate(self.gather(problem)):
            if text is not None:
                raise UserError(text if failed == 0 else f"{text} (on rank {failed})")

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0 and return its result on every rank."""
        return self.gather(self.agree(lambda: function() if self.is_main else None))[0]  # type: ignore[return-value]

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the units of this rank, ascending; the largest go first, each to the rank with the least work.

        Args:
            sizes: the work of each unit.
        """
        loads = [0] * self.size
        mine = []
        for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
            owner = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[owner] += sizes[unit] + 1
            if owner == self.rank:
                mine.append(unit)
        return sorted(mine)

    def each(self, sizes: Sequence[int], work: Callable[[int], Result]) -> list[Result]:
        """Call `work(unit)` for every unit, each on one rank; return the results of all units on every rank.

        Args:
            sizes: the work of each unit, to divide it evenly.
            work: must not depend on the rank.

        Raises:
            UserError: `work` raised it, or an OSError, on any rank.
        """
        done: dict[int, Result] = {}
        problem = None
        try:
            for unit in self.share(sizes):
                if self._stop_requested():
                    break
                done[unit] = work(unit)
        except (UserError, OSError) as error:
            problem = _describe(error)
            self._request_stop()
        self.raise_on_all(problem)
        results: dict[int, Result] = {}
        for part in self.gather(done):
            results |= part
        assert len(results) == len(sizes), "units were left out though no rank failed"
        return [results[unit] for unit in range(len(sizes))]

    def _request_stop(self) -> None:
        others = [other for other in range(self.size) if other != self.rank]
        self._sent = [self._world.isend(None, dest=other, tag=_STOP) for other in others]  # kept until the end

    def _stop_requested(self) -> bool:
        return self._world is not None and bool(self._world.iprobe(tag=_STOP))

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Send `parts[r]` (uint64) to rank r; return what the ranks sent here, in rank order (MPI all-to-all)."""
        if self._world is None:
            return [parts[0]]
        counts = np.array([len(part) for part in parts], dtype=np.int64)
        arriving = np.empty_like(counts)
        self._world.Alltoall(counts, arriving)
        received = np.empty(int(arriving.sum()), dtype=np.uint64)
        starts, places = np.cumsum(counts) - counts, np.cumsum(arriving) - arriving
        self._world.Alltoallv([np.concatenate(parts), (counts, starts)], [received, (arriving, places)])
        return np.split(received, places[1:])

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all ranks at once when one of them fails in the block, which holds the whole run.

        Raises:
            UserError: every rank raises it, by the methods above.
            SystemExit: --help was given, on every rank.
        """
        try:
            yield
        except UserError as error:
            error.agreed = True
            raise
        except SystemExit:
            raise
        except BaseException as error:
            if self._world is None:
                raise
            if isinstance(error, KeyboardInterrupt):
                print(f"interrupted on rank {self.rank}; {RESUME}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
                last = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"error: rank {self.rank} of {self.size} failed: {last}", file=sys.stderr, flush=True)
            self._world.Abort(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
