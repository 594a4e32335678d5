"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a value.

    The message is one line that names the thing at fault and the fix. Commands print it as
    `error: ...` and exit with code 2; no traceback. `assert` stays for mistakes of ours.
    """

    agreed = False  # raised by every rank at the same point (common/distributed)
