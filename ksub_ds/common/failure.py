"""Why a run ended before its time: what is written to RUN/failure.json, the line that is printed, the exit code."""

import dataclasses
import time
from dataclasses import dataclass

EXIT_USER_ERROR, EXIT_FAILED, EXIT_INTERRUPTED = 2, 70, 130


@dataclass(frozen=True)
class Failure:
    """What ended a run before its time. RUN/failure.json holds these fields."""

    rank: int
    host: str
    step: int | None  # optimizer step under way; None before the first
    reason: str
    exit_code: int = EXIT_FAILED
    restart_may_help: bool = True
    time: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    def line(self) -> str:
        """The last line of the run."""
        if self.exit_code == EXIT_USER_ERROR:
            return f"error: {self.reason}"
        if self.exit_code == EXIT_INTERRUPTED:
            return self.reason
        at = "" if self.step is None else f" at step {self.step:,}"
        return f"failed: rank {self.rank} on {self.host}{at}: {self.reason}; the same command continues"


def in_one_line(error: BaseException) -> str:
    """Type and message of an exception, cut where it is long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def lost_the_other_end(error: BaseException) -> bool:
    """Whether an exception looks like a collective that lost its other end."""
    import torch.distributed as dist

    signs = ("gloo", "connection closed", "connection reset", "broken pipe", "timed out", "nccl", "socket")
    is_network = isinstance(error, (dist.DistError, ConnectionError))
    return is_network or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs))
