"""The same text twice in one language: copies of a file, and a file beside its own compressed form."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from ksub_ds.common.compression import DamagedFileError, decompressed, is_bomb
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.text_files import TextFile, TextName, parse_text_name, printable

COMPARED = 1 << 20  # bytes at a time

ParseName = Callable[[str], TextName | None]


def without_copies(files: list[TextFile], skipped: Skipped, parse_name: ParseName = parse_text_name) -> list[TextFile]:
    """Leave out all but one of the files that hold the same text: equal files, and compressed forms of one file.

    Args:
        files: of one language.
        skipped: where what is left out is counted.
        parse_name: returns the parts of a file's name; files of one stem and form hold the same.

    Returns:
        The other files, in the same order.

    Raises:
        UserError: a file and its compressed form hold different text.
    """
    plain_of = _compressed_copies(files, parse_name)
    contents = _contents(files, {*plain_of, *plain_of.values()})
    same_as: dict[str, str] = {}  # a content in another form; a copy of a compressed file is one of its plain file
    for other, plain in plain_of.items():
        one, two = _end(same_as, contents[other]), _end(same_as, contents[plain])
        if one != two:
            same_as[one] = two
    first: dict[str, TextFile] = {}
    for file in sorted(files, key=lambda file: file in plain_of):
        first.setdefault(_end(same_as, contents[file]), file)
    kept = []
    for file in files:
        chosen = first[_end(same_as, contents[file])]
        if chosen is file:
            kept.append(file)
        elif file in plain_of:
            skipped.add("compressed_copy", f"{printable(file.name)} holds what {printable(chosen.name)} holds")
        else:
            skipped.add("copy", f"{printable(file.name)} is a copy of {printable(chosen.name)}")
    _tell_of_forms(kept, parse_name)
    return kept


def _contents(files: list[TextFile], paired: set[TextFile]) -> dict[TextFile, str]:
    """Return what tells each file's content apart; few are hashed, since few have the size of another."""
    sizes = Counter(file.size for file in files)
    return {
        file: (file.digest if (file.size and sizes[file.size] > 1) or file in paired else "") or file.name
        for file in files
    }


def _end(same_as: dict[str, str], content: str) -> str:
    while content in same_as:
        content = same_as[content]
    return content


def _compressed_copies(files: list[TextFile], parse_name: ParseName) -> dict[TextFile, TextFile]:
    """Return the compressed forms of files that are there in another form too, and that other file.

    Raises:
        UserError: their contents differ.
    """
    plain_of = {}
    for forms in _groups(files, parse_name, with_form=True):
        plainest, *others = sorted(forms, key=lambda file: (_compression(file, parse_name) != "", file.name))
        for other in (file for file in others if _compression(file, parse_name)):
            difference = _difference(plainest, other)
            if difference:
                raise UserError(
                    f"{printable(other.path)}: beside {printable(plainest.path.name)}, which has the same name but for "
                    f"compression, but {difference}; remove or rename one of them"
                )
            plain_of[other] = plainest
    return plain_of


def _tell_of_forms(files: list[TextFile], parse_name: ParseName) -> None:
    groups = [sorted(printable(file.name) for file in group) for group in _groups(files, parse_name, with_form=False)]
    if groups:
        more = f" and {len(groups) - 1:,} more" if len(groups) > 1 else ""
        get_logger().info(
            f"warning: {' and '.join(groups[0])}{more}: files of one name in different forms are all read; if they "
            "hold the same documents, remove one"
        )


def _groups(files: Iterable[TextFile], parse_name: ParseName, with_form: bool) -> list[list[TextFile]]:
    """Return the files of one folder that share a name but for their compression, and but for their form."""
    groups: dict[tuple[PurePosixPath, str, str], list[TextFile]] = {}
    for file in files:
        path = PurePosixPath(file.name)
        name = parse_name(path.name)
        if name is not None:
            groups.setdefault((path.parent, name.stem, name.form if with_form else ""), []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def _compression(file: TextFile, parse_name: ParseName) -> str:
    name = parse_name(file.path.name)
    return name.compression if name else ""


def _difference(one: TextFile, two: TextFile) -> str:
    """Return in words how the decompressed contents of two files differ, or "" if they are equal."""
    with open(one.path, "rb") as raw_one, open(two.path, "rb") as raw_two:
        streams = decompressed(raw_one), decompressed(raw_two)
        for position in itertools.count(step=COMPARED):
            pieces = []
            for file, stream in zip((one, two), streams, strict=True):
                try:
                    pieces.append(stream.read(COMPARED))
                except DamagedFileError as error:
                    return f"{printable(file.path.name)} is damaged ({error})"
            if pieces[0] != pieces[1]:
                return "their contents differ"
            # A bomb is not compared to its end: it is taken for equal, and its reader will say that it is a bomb.
            if not pieces[0] or is_bomb(position, min(one.size, two.size)):
                break
    return ""
