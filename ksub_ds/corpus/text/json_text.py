"""Documents and other values of JSON files: one a line, an array of them, or objects printed over several lines."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from ksub_ds.corpus.text import file_content
from ksub_ds.corpus.text.file_content import FileContent
from ksub_ds.corpus.text.layout import TextLayout
from ksub_ds.corpus.text.skipped import shown

_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")
_BLANK = b" \t\r\n"


def json_texts(file: FileContent, layout: TextLayout) -> Iterator[str]:
    """Yield the texts of a JSON file; what has none is counted.

    Args:
        file: JSON, one way or another.
        layout: which key holds the text.
    """
    for value in json_values(file):
        text = layout.text_of(value) if isinstance(value, dict) else None
        if isinstance(text, str):
            yield text
        else:
            file.add("no_text_key", layout.missing_in(value))


def json_values(file: FileContent) -> Iterator[Any]:
    """Return an iterator over the values of a JSON file; what is not a value is counted.

    Args:
        file: JSON, one way or another.
    """
    return _spread_values(file) if _is_spread(file.head) else _lines_of_json(file)


def _is_spread(head: bytes) -> bool:
    """Return whether a file is an array of objects or objects over several lines, not one value a line."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    first, _, rest = start.partition(b"\n")
    if first.rstrip(_BLANK) == b"{":
        return True
    if not re.match(rb"\[\s*\{", start):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip(_BLANK)


def _lines_of_json(file: FileContent) -> Iterator[Any]:
    for line in file.lines():
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            file.not_utf8(line)
            continue
        except (ValueError, RecursionError):
            start = shown(line[:200].decode("utf-8-sig", "replace").strip())
            file.add("bad_json", f'not a JSON object of one line: "{start}"')
            continue
        yield value


def _spread_values(file: FileContent) -> Iterator[Any]:
    """Yield the values of arrays, or those that follow each other, wherever their lines end.

    Damage ends the file: where the next value begins is not known.
    """
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    pieces = file.pieces()
    text, position, open_arrays, number = "", 0, 0, 0

    def more() -> bool:
        """Read as much as waits to be parsed already, so that the time stays linear."""
        nonlocal text, position
        waiting, wanted = [text[position:]], max(1, len(text) - position)
        while wanted > 0:
            piece = next(pieces, None)
            waiting.append(utf8.decode(piece or b"", final=piece is None))
            if piece is None:
                break
            wanted -= len(piece)
        grown = len(waiting[0])
        text, position = "".join(waiting), 0
        return len(text) > grown

    while True:
        between = _BETWEEN.match(text, position)
        if between:
            open_arrays += between[0].count("[") - between[0].count("]")
            position = between.end()
        if position == len(text):
            if more():
                continue
            break
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            if len(text) - position <= file_content.LONGEST_LINE and more():
                continue
            place = f'after {number:,} values: "{shown(text[position : position + 60])}"'
            if len(text) - position > file_content.LONGEST_LINE:
                file.add("too_long", f"no JSON value of at most {file_content.LONGEST_LINE:,} characters {place}")
            else:
                file.add("damaged_json", f"no JSON, or cut short, {place}; nothing is read from there on")
            return
        number += 1
        raw = text[position:end]
        position = end
        try:
            raw.encode()
        except UnicodeEncodeError:
            file.not_utf8(raw.encode("utf-8", "surrogateescape"))
            continue
        yield value
    if open_arrays > 0:
        file.add("damaged_json", f"the array is not closed after {number:,} values: the file is cut short")
