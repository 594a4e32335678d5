"""Locks on open files (flock): one process at a time works in a folder, and the lock ends with the process."""

import fcntl
from typing import IO, Any


def try_lock(file: int | IO[Any], shared: bool = False) -> bool:
    """Try to lock an open file, without waiting.

    The lock lasts until every descriptor of this open file is closed, however the process ends.

    Args:
        file: a descriptor or a stream, open for writing: NFS needs that for an exclusive lock.
        shared: take a lock that other processes may share.

    Returns:
        Whether this process has the lock now; False if another one holds it.

    Raises:
        OSError: the file system cannot lock files.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
