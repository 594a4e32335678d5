"""Between two attempts: which hosts are left, is the run folder free, and where does the run continue."""

import contextlib
import fcntl
import time
from pathlib import Path

from ksub_ds.cluster.preflight import reachable
from ksub_ds.common.errors import UserError

LOCK_SECONDS = 180.0  # a host that is cut off still holds the run folder, until its own watchdog ends it


def hosts_left(hosts: dict[str, int], min_hosts: int | None, host_wait: float, ssh_port: str | None) -> dict[str, int]:
    """The hosts to restart on; waits up to `host_wait` seconds for lost ones to come back.

    Args:
        min_hosts: go on with fewer, but not fewer than these; None: all or none.

    Raises:
        UserError: too few of them answer.
    """
    deadline = time.monotonic() + host_wait
    least = len(hosts) if min_hosts is None else min_hosts
    while True:
        gone = reachable(list(hosts), ssh_port)
        left = {host: slots for host, slots in hosts.items() if host not in gone}
        if not gone or (time.monotonic() > deadline and len(left) >= least):
            return left
        if time.monotonic() > deadline:
            fix = "" if min_hosts else "; --min-hosts N would go on with fewer"
            raise UserError(f"no restart: {', '.join(gone)} cannot be reached{fix}; the same command continues")
        time.sleep(1)


def wait_for_lock(run: Path) -> None:
    """Wait until nobody holds the run folder; after three minutes the next attempt will say who does."""
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.suppress(OSError), (run / ".lock").open("r+b") as stream:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)
            else:
                return


def last_checkpoint(run: Path) -> str:
    """The newest checkpoint of a run, in words. Damaged ones are passed over when the run continues, not here."""
    found = [path.parent for path in (run / "checkpoints").glob("global_step*/manifest.json")]
    steps = {int(number): path for path in found if (number := path.name.removeprefix("global_step")).isdecimal()}
    return f"last checkpoint: {steps[max(steps)]}" if steps else "there is no checkpoint yet"
