"""`UserError`, the one exception that means "the user can fix this", and `RunFailed`, which means "try it again"."""

RESUME = "run the same command again to resume"
# What code raises that reads a damaged file of JSON, or one of another program, as if it were its own.
OTHER_FORM = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a value.

    The message is one line that names the thing at fault and the fix. Commands print it as
    `error: ...` and exit with code 2, without a traceback. `assert` is for mistakes of ours.

    Attributes:
        agreed: every rank raises this error at the same point, so rank 0 alone prints it.
    """

    def __init__(self, message: str, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class RunFailed(RuntimeError):
    """Work that ended by no mistake of the user's: a process killed, lost or out of memory.

    The message is one line. Commands print it as `failed: ...` and exit with code 70: the same command may succeed.
    """


def one_line(error: BaseException, longest: int = 200) -> str:
    """Return the message of an exception as one line of so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def describe_os_error(error: OSError) -> str:
    """Return the line for a user whose file or disk caused an OSError: file, reason, and what to do."""
    reason = error.strerror or one_line(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{reason}; fix it, then {RESUME}"
