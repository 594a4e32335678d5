"""One run of shard_cc that times its stages, for corpus.py.

    python benchmarks/corpus_timed.py WET OUT TOKENIZER 1 RESULT.json        # 0: every page counts as English

Alone or under mpirun; rank 0 writes what each rank measured: processor seconds of the stages and of its own units
of work in them, wall time, peak memory.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksub_ds.common.files import write_json
from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl.config import ShardCC
from ksub_ds.corpus.commoncrawl.inputs import find_wet_files
from ksub_ds.corpus.commoncrawl.langid import LanguageIdentifier
from ksub_ds.corpus.commoncrawl.pipeline import CrawlRun, load_selection
from ksub_ds.corpus.commoncrawl.stages import Result, Stage
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.tokenizers.loading import load_tokenizer


class Clock:
    """Processor seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


class TimedIdentifier:
    """An identifier that times itself; without one, every page is English."""

    def __init__(self, clock: Clock, identifier: LanguageIdentifier | None):
        self._clock, self._identifier = clock, identifier
        self.fingerprint = identifier.fingerprint if identifier else "none"

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        if self._identifier is None:
            return [("en", 1.0)] * len(texts)
        with self._clock("identify"):
            return self._identifier.identify(texts)


class TimedComm(MPIComm):
    """Ranks that time their own units of work, without the waiting for others."""

    def __init__(self, clock: Clock):
        super().__init__()
        self._clock = clock
        self.stage = ""

    def each(self, sizes: Sequence[int], work: Callable[[int], Any]) -> list[Any]:
        def timed(unit: int) -> Any:
            with self._clock(f"units of {self.stage}"):
                return work(unit)

        return super().each(sizes, timed)


class TimedRun(CrawlRun):
    """A run that times its stages."""

    clock: Clock
    timed_comm: TimedComm

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self.timed_comm.stage = stage
        with self.clock(stage):
            yield

    def _run(self, stage: Stage) -> list[Result]:
        with self._timed(stage.name):
            return super()._run(stage)

    def _deduplicate(self, *arguments: Any) -> Any:
        with self._timed("deduplicate"):
            return super()._deduplicate(*arguments)

    def _pack(self, *arguments: Any) -> Any:
        with self._timed("pack"):
            return super()._pack(*arguments)


def run_timed(wet: Path, out: Path, tokenizer_path: Path, identify: bool, result: Path) -> None:
    """Do one run on one rank."""
    clock = Clock()
    comm = TimedComm(clock)
    settings = ShardCC(tokenizer_path, out, (wet,), min_length=300)
    selection = load_selection(settings)
    identifier = TimedIdentifier(clock, selection.identifier if identify else None)
    selection = replace(selection, identifier=identifier)
    comm.on_main(lambda: out.mkdir(parents=True))
    wall = time.perf_counter()
    with clock("load the tokenizer"):
        tokenizer = load_tokenizer(tokenizer_path)
    run = TimedRun(settings, comm, find_wet_files(settings.input, Skipped()), tokenizer, selection)
    run.clock, run.timed_comm = clock, comm
    with clock("all"):
        report = run.run()
    seconds = {name: value for name, value in clock.seconds.items() if not name.startswith("units of ")}
    seconds["select"] -= seconds.get("identify", 0.0)
    everything = seconds.pop("all") + seconds["load the tokenizer"]
    seconds["begin and end"] = everything - sum(seconds.values())  # the tokenizer's copy, the manifest
    measured = {
        "documents": report["stages"]["read"]["-"]["documents_in"],
        "bytes": report["stages"]["read"]["-"]["bytes_in"],
        "wall": time.perf_counter() - wall,
        "seconds": seconds,
        "units": {name: value for name, value in clock.seconds.items() if name.startswith("units of ")},
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    everyone = comm.gather(measured)
    if comm.is_main:
        write_json(result, everyone)


if __name__ == "__main__":
    wet, out, tokenizer, identify, result = sys.argv[1:]
    run_timed(Path(wet), Path(out), Path(tokenizer), identify == "1", Path(result))
