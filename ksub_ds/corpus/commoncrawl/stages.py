"""Stages from file to file: each input file is a unit of work, done once, by whichever rank.

A unit writes its files under temporary names, renames them, and then its marker WORK/<stage>/<unit>.json,
which holds its result and its recipe: all that decides that result. A rerun takes the units whose recipe
is still the same from their markers.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import Progress
from ksub_ds.common.mpi import MPIComm

Recipe = dict[str, Any]


def fingerprint(value: Any) -> str:
    """sha256 of something that JSON can spell."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Stages:
    """Runs stages over the units of one input.

    Args:
        work: the folder of the intermediate files; the ranks share it.
        names: of the units, for messages.
        sizes: bytes of each unit, for dividing the work and for the progress.
    """

    def __init__(self, work: Path, ranks: MPIComm, names: Sequence[str], sizes: Sequence[int]):
        self.work, self.ranks = work, ranks
        self._names, self._sizes = names, sizes

    def path(self, stage: str, unit: int, suffix: str) -> Path:
        """A file of one unit of a stage."""
        return self.work / stage / f"{unit:06d}.{suffix}"

    def run(
        self,
        stage: str,
        description: str,
        recipes: Sequence[Recipe],
        work: Callable[[int], dict[str, Any]],
        is_whole: Callable[[int, dict[str, Any]], bool],
    ) -> list[dict[str, Any]]:
        """The results of all units, each computed now or by an earlier run, on every rank.

        Args:
            description: what the progress calls it.
            recipes: of each unit, what decides its result.
            work: writes the unit's files and gives its result, which JSON can spell.
            is_whole: whether the files of a unit with this result are there; if not, it is done again.

        Raises:
            UserError: on every rank, when a unit failed on any.
        """
        self.ranks.on_main(lambda: (self.work / stage).mkdir(parents=True, exist_ok=True))
        total = sum(self._sizes[unit] for unit in self.ranks.share(self._sizes))
        shown = description if self.ranks.size == 1 else f"{description} (rank 0 of {self.ranks.size})"
        with Progress(total // 1000, "kB", shown) as progress:

            def one(unit: int) -> dict[str, Any]:
                result = self._once(stage, unit, recipes[unit], work, is_whole)
                progress.advance(self._sizes[unit] // 1000, file=self._names[unit].rpartition("/")[2])
                return result

            return self.ranks.each(self._sizes, one)

    def _once(
        self,
        stage: str,
        unit: int,
        recipe: Recipe,
        work: Callable[[int], dict[str, Any]],
        is_whole: Callable[[int, dict[str, Any]], bool],
    ) -> dict[str, Any]:
        marker = self.path(stage, unit, "json")
        if marker.is_file():
            try:
                earlier = read_json(marker)
                if earlier["recipe"] == recipe and is_whole(unit, earlier["result"]):
                    return earlier["result"]
            except (UserError, KeyError, TypeError):
                pass  # a damaged marker: do the unit again
            marker.unlink()
        try:
            result = work(unit)
            write_json(marker, {"recipe": recipe, "result": result})
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"{stage} of {self._names[unit]}: {reason}{where}; mend it and rerun") from error
        return result
