"""End what a launch has left on this host: processes that carry its id in their environment, and no others.

    python -m ksub_ds.cluster.cleanup LAUNCH_ID SECONDS

After SECONDS in which they may end by themselves they are killed (SIGKILL). Prints how many had to be.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from ksub_ds.cluster.launch_spec import LAUNCH_ID

GONE_SECONDS = 20.0  # a killed process may hang in the kernel (a dead network disk)


def processes_of_launch(launch_id: str) -> list[int]:
    """Return the ids of the processes on this host that belong to a launch, without this process."""
    word, found = f"{LAUNCH_ID}={launch_id}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if entry.name.isdigit() and word in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid() and not _is_zombie(pid)]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill_orphans(launch_id: str, patience: float) -> int:
    """Kill what is left of a launch on this host.

    Args:
        launch_id: the id of the launch.
        patience: seconds in which the processes may end by themselves.

    Returns:
        How many processes had to be killed.
    """
    end = time.monotonic() + patience
    while (left := processes_of_launch(launch_id)) and time.monotonic() < end:
        time.sleep(0.1)
    count, end = len(left), time.monotonic() + GONE_SECONDS
    while left and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = processes_of_launch(launch_id)
    return count


if __name__ == "__main__":
    print(kill_orphans(sys.argv[1], float(sys.argv[2])))
