"""The folder that a command makes: what may stand in its place, asked before the long work."""

from collections.abc import Callable
from pathlib import Path

from ksub_ds.common.errors import UserError


def check_output_folder(out: Path, kind: str, is_one: Callable[[Path], bool]) -> bool:
    """Check that a command may make a folder, or replace one of its own.

    Args:
        out: the folder, of --out.
        kind: what the command makes, as in "an export".
        is_one: whether a folder that is not empty is what the command made earlier.

    Returns:
        Whether something is replaced.

    Raises:
        UserError: another folder or file is there, a git repository, or the current folder or one above it.
    """
    here = Path.cwd()
    if out.name in ("", "..") or out.resolve() in (here, *here.parents):
        raise UserError(f"--out {out}: is or holds the current folder; name one that can be made")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir() or not is_one(out):
        raise UserError(f"--out {out}: is not {kind} and not empty; choose another folder")
    if (out / ".git").exists():
        raise UserError(f"--out {out}: is a git repository, which would be lost; choose another folder")
    return True
