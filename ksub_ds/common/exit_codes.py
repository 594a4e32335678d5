"""The exit codes of all programs, and the one way a program ends with them.

    0        DONE          finished, or stopped in order because the user asked for it
    1                      a bug: Python's own code, after a traceback
    2        USER_ERROR    the user's mistake, or a run that cannot go on (NaN, full disk): a restart changes nothing
    70       FAILED        a rank failed, is lost or hangs: the same command may succeed, and resumes
    75       REQUEUE       stopped for a scheduler, everything saved: start the command again
    130      INTERRUPTED   Ctrl-C (128 + SIGINT)
    141      BROKEN_PIPE   the reader of stdout has exited, as in `| head` (128 + SIGPIPE)
    128 + n                ended by signal n: 129 SIGHUP, 137 SIGKILL, 143 SIGTERM

70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h. launch/pretrain.sbatch knows 0, 2, 75 and 130 by number.
"""

import errno
import os
import select
import sys
from collections.abc import Callable

from ksub_ds.common.errors import RESUME, RunFailed, UserError, describe_os_error
from ksub_ds.common.rank_env import is_main

# Of a file or a disk; a network or a device that fails is none of the user's mistakes.
MENDED_BY_USERS = {
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOTEMPTY),
}
DONE, USER_ERROR, FAILED, REQUEUE, INTERRUPTED, BROKEN_PIPE = 0, 2, 70, 75, 130, 141


def exit_code_of_signal(number: int) -> int:
    """Return the exit code of a process that signal `number` ended, as shells report it."""
    return 128 + number


def run_main(main: Callable[[], int | None], resumes: bool = True) -> int:
    """Call a program's main function; what the user caused becomes one line on stderr and an exit code.

    Args:
        main: returns its exit code; None means 0.
        resumes: whether the same command resumes after Ctrl-C or a failure; the line then says so.

    Returns:
        The exit code, for `sys.exit`.

    Raises:
        BrokenPipeError: of another pipe than stdout.
    """
    try:
        code = _one_line_errors(main, resumes)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_has_exited(sys.stdout.fileno()):
            raise  # another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return BROKEN_PIPE


def _one_line_errors(main: Callable[[], int | None], resumes: bool) -> int:
    try:
        return main() or DONE
    except UserError as error:
        if not error.agreed or _prints_for_all():
            _print_error(str(error))
        return USER_ERROR
    except RunFailed as error:
        print(f"failed: {error}" + (f"; {RESUME}" if resumes else ""), file=sys.stderr, flush=True)
        return FAILED
    except OSError as error:
        if error.errno not in MENDED_BY_USERS:
            raise
        _print_error(describe_os_error(error))
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted; {RESUME}" if resumes else "interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def _print_error(message: str) -> None:
    """Print one line: ends of lines in the name of a file, say, are escaped, as is what the terminal cannot show."""
    line = "".join(repr(each)[1:-1] if each in "\r\n\v\f\x1b" else each for each in message)
    encoding = sys.stderr.encoding or "utf-8"
    print(f"error: {line}".encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)


def _prints_for_all() -> bool:
    try:
        return is_main()
    except UserError:  # a rank in the environment that is not a number
        return True


def _reader_has_exited(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
