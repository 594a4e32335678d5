"""What all parts of the trip share: where things are, how large they are, how long there is, how a device is timed."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if str(BENCHMARKS) not in sys.path:  # loss.py: the variants, and the errors against float64
    sys.path.append(str(BENCHMARKS))

HIDDEN_CYCLES = 20_000_000  # 10 ms at 2 GHz

Row = dict[str, Any]
Variants = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True)
class Trip:
    """One trip: a GPU machine measured, or a rehearsal on a CPU with everything small.

    Attributes:
        out: folder of the results.
        rehearsal: small sizes, few repeats.
        device: cuda or cpu.
        ends: time.monotonic() after which no variant is begun; a rehearsal has no end.
        data: folder with shards/ and codes/, which the parts that train need.
    """

    out: Path
    rehearsal: bool
    device: str
    ends: float
    data: Path | None = None

    @property
    def tokens(self) -> int:
        """N of what is not read from --data."""
        return 2000 if self.rehearsal else 250_002

    @property
    def preset(self) -> str:
        return "tiny" if self.rehearsal else "xlmr_medium"

    @property
    def length(self) -> int:
        return 64 if self.rehearsal else 512

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    # ------------------------------------------------------------------------------------------------ measuring

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], object], seconds: float = 0.5) -> float:
        """Return the median time of a call, on the device's own clock; two calls go before.

        The call must not wait for the device: that would put the host's time between its kernels.
        """
        for _ in range(2):
            function()
        self.synchronize()
        times: list[float] = []
        end = time.perf_counter() + (0.05 if self.rehearsal else seconds)
        while not times or (time.perf_counter() < end and len(times) < 200):
            times.append(self._one_call(function))
        return round(statistics.median(times), 4)

    def _one_call(self, function: Callable[[], object]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Work for the device while the host launches the call's kernels: a step of a training hides those launches too.
        torch.cuda._sleep(HIDDEN_CYCLES)
        before.record()
        function()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def extra_megabytes(self, function: Callable[[], object]) -> float | None:
        """Return the peak of the device's memory above what is held before the call; None on a CPU."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
