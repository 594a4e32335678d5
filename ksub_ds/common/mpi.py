"""Work divided over MPI ranks, or done by this process alone: the same program.

    ranks = MPIComm()
    results = ranks.each("reading", sizes, lambda unit: ...)    # every unit once; all results on all ranks

A rank that meets a UserError tells the others, which stop at the end of the unit they are at; then all
raise it. Nobody waits for a rank that is gone: what is not a UserError ends the whole world of
processes, after its traceback.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.rank_env import has_mpi, world_size

Result = TypeVar("Result")
_STOP = 77  # tag of the message "I have failed, stop at your next unit"


def mpi_communicator() -> Any:
    """MPI's world of processes where mpirun or srun started several, else None: for work without a process group.

    Raises:
        UserError: several processes were started, but with no MPI between them.
    """
    if not has_mpi():
        return None
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_size() != world_size():
        raise UserError(
            f"{world_size()} processes were started, but MPI sees {MPI.COMM_WORLD.Get_size()}; start them with "
            "mpirun, or with srun --mpi=pmix (srun --mpi=list tells what this machine has)"
        )
    return MPI.COMM_WORLD


def _describe(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or " ".join(str(error).split())
    return f"{error.filename}: {reason}; mend it and rerun" if error.filename else f"{reason}; mend it and rerun"


class MPIComm:
    """The processes of this run.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        self._world = mpi_communicator()
        self.rank: int = 0 if self._world is None else self._world.Get_rank()
        self.size: int = 1 if self._world is None else self._world.Get_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in rank order, on every rank."""
        return [value] if self._world is None else self._world.allgather(value)

    def agree(self, function: Callable[[], Result]) -> Result:
        """Call `function` on every rank; when it raises UserError on any, every rank raises that of the lowest.

        An OSError (a full disk, a folder that is gone) is the user's to mend as well.
        """
        problem, result = None, None
        try:
            result = function()
        except (UserError, OSError) as error:
            problem = _describe(error)
        self.raise_on_all(problem)
        return result  # type: ignore[return-value]  # no problem anywhere: function() returned

    def raise_on_all(self, problem: str | None) -> None:
        """Raise UserError on every rank when any rank has a problem."""
        for failed, text in enumerate(self.gather(problem)):
            if text is not None:
                raise UserError(text if failed == 0 else f"{text} (on rank {failed})")

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` on rank 0 and give its result to all."""
        return self.gather(self.agree(lambda: function() if self.is_main else None))[0]  # type: ignore[return-value]

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The units of this rank, ascending: the largest first to whoever has least."""
        loads = [0] * self.size
        mine = []
        for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
            owner = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[owner] += sizes[unit] + 1
            if owner == self.rank:
                mine.append(unit)
        return sorted(mine)

    def each(self, sizes: Sequence[int], work: Callable[[int], Result]) -> list[Result]:
        """Call `work(unit)` for every unit, each on one rank; the results of all units, on every rank.

        Args:
            sizes: how much work each unit is, for dividing it evenly.
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
        assert len(results) == len(sizes), "units were left out though nobody failed"
        return [results[unit] for unit in range(len(sizes))]

    def _request_stop(self) -> None:
        others = [other for other in range(self.size) if other != self.rank]
        self._sent = [self._world.isend(None, dest=other, tag=_STOP) for other in others]  # kept until the end

    def _stop_requested(self) -> bool:
        return self._world is not None and bool(self._world.iprobe(tag=_STOP))

    def exchange(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Send `parts[r]` (uint64) to rank r; what the ranks sent here, in rank order (MPI all-to-all)."""
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
        """Around a whole run: whatever but UserError or SystemExit ends one rank ends them all at once."""
        try:
            yield
        except (UserError, SystemExit):
            raise
        except BaseException as error:
            if self._world is None:
                raise
            if isinstance(error, KeyboardInterrupt):
                print(f"interrupted on rank {self.rank}; the same command continues", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
                last = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"error: rank {self.rank} of {self.size} failed: {last}", file=sys.stderr, flush=True)
            self._world.Abort(130 if isinstance(error, KeyboardInterrupt) else 1)
