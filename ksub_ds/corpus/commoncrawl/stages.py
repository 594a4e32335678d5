"""Stages of the pipeline: each turns files into files, one unit (an input file) at a time, on any rank.

A unit's files are written under temporary names and renamed; its marker WORK/<stage>/<unit>.json comes last. The
marker holds the unit's result and its key, which is everything that decides the result. A rerun takes the result
from the marker where the key is still the same and the files are there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from ksub_ds.common.errors import RESUME, UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import Progress
from ksub_ds.common.mpi import MPIComm

StageKey = dict[str, Any]
"""What decides the result of a unit, as JSON can hold it."""
Result = dict[str, Any]
"""What a unit reports besides its files, as JSON can hold it."""


def fingerprint(value: Any) -> str:
    """Return the sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class UnitFiles(Sequence[Path]):
    """The files of one kind that a stage writes, one for each unit: WORK/<stage>/<unit>.<suffix>.

    Args:
        folder: WORK/<stage>.
        suffix: of the files, without its dot.
        count: number of units.
    """

    def __init__(self, folder: Path, suffix: str, count: int):
        self._folder, self._suffix, self._count = folder, suffix, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, unit: int) -> Path: ...
    @overload
    def __getitem__(self, unit: slice) -> list[Path]: ...
    def __getitem__(self, unit: int | slice) -> Path | list[Path]:
        if isinstance(unit, slice):
            return [self[each] for each in range(*unit.indices(self._count))]
        if not 0 <= unit < self._count:
            raise IndexError(unit)
        return self._folder / f"{unit:06d}.{self._suffix}"


def _always(result: Result) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """A step from files to files. Unit u is done by `run(**{name: each[u]})` over inputs and outputs.

    Attributes:
        name: of the folder WORK/<name>/ of its markers.
        description: what the progress line calls it.
        inputs: name -> what each unit reads.
        outputs: name -> the file that each unit writes.
        keys: of each unit.
        run: writes the outputs of a unit and returns its result.
        check: whether further files that an earlier result names are there.
    """

    name: str
    description: str
    inputs: Mapping[str, Sequence[Any]]
    outputs: Mapping[str, Sequence[Path]]
    keys: Sequence[StageKey]
    run: Callable[..., Result]
    check: Callable[[Result], bool] = _always

    def run_unit(self, unit: int) -> Result:
        """Do one unit."""
        return self.run(**{name: each[unit] for name, each in {**self.inputs, **self.outputs}.items()})

    def is_complete(self, unit: int, result: Result) -> bool:
        """Return whether all files of a unit with this result are there."""
        return all(files[unit].is_file() for files in self.outputs.values()) and self.check(result)


class StageRunner:
    """Runs stages over the units of one input.

    Args:
        work: folder of the intermediate files, shared by the ranks.
        comm: the ranks.
        names: of the units, for messages.
        sizes: bytes of each unit, to divide the work and to show progress.
    """

    def __init__(self, work: Path, comm: MPIComm, names: Sequence[str], sizes: Sequence[int]):
        self._work, self._comm = work, comm
        self._names, self._sizes = names, sizes

    def files(self, stage: str, suffix: str) -> UnitFiles:
        """Return the paths of one kind of file that a stage writes."""
        return UnitFiles(self._work / stage, suffix, len(self._names))

    def run(self, stage: Stage) -> list[Result]:
        """Return the results of all units, each computed now or by an earlier run, on every rank.

        Raises:
            UserError: on every rank, when a unit failed on any.
        """
        self._comm.on_main(lambda: (self._work / stage.name).mkdir(parents=True, exist_ok=True))
        total = sum(self._sizes[unit] for unit in self._comm.share(self._sizes))
        rank = "" if self._comm.size == 1 else f" (rank 0 of {self._comm.size})"
        with Progress(total // 1000, "kB", stage.description + rank) as progress:

            def one(unit: int) -> Result:
                result = self._once(stage, unit)
                progress.advance(self._sizes[unit] // 1000, file=self._names[unit].rpartition("/")[2])
                return result

            return self._comm.each(self._sizes, one)

    def _once(self, stage: Stage, unit: int) -> Result:
        """Take a unit's result from its marker, or do the unit and write the marker.

        Raises:
            UserError: a file cannot be read or written.
        """
        marker, key = self.files(stage.name, "json")[unit], stage.keys[unit]
        if marker.is_file():
            try:
                earlier = read_json(marker)
                if earlier["recipe"] == key and stage.is_complete(unit, earlier["result"]):
                    return earlier["result"]
            except (UserError, KeyError, TypeError):
                pass  # a damaged marker: do the unit again
            marker.unlink()
        try:
            result = stage.run_unit(unit)
            write_json(marker, {"recipe": key, "result": result})
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"{stage.name} of {self._names[unit]}: {reason}{where}; fix it, then {RESUME}") from error
        return result
