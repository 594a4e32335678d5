"""The WET files of a run: files that the user has, or those of a Common Crawl snapshot, fetched into a cache folder.

    find_wet_files([Path("wet")], Skipped())
    fetch_snapshot("2019-09", "0:40", "https://data.commoncrawl.org", Path("cache"))     # 40 paths under cache/

The order of the files decides which copy of a paragraph is the first. Below a folder links are followed; hidden names
and other suffixes are left out. Of copies of a file, and of a file in two compressions, one is read.

Common Crawl's public layout: BASE/crawl-data/CC-MAIN-2019-09/wet.paths.gz lists the files of a snapshot, one path
below BASE on each line. `segments` is a range of those lines. The servers are public and answer 403 or 503 to clients
that send too many requests; download.py keeps to few connections and retries with pauses.
"""

import gzip
import re
import urllib.parse
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ksub_ds.common import compression
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import get_logger
from ksub_ds.corpus.commoncrawl.download import Downloads, Patience
from ksub_ds.corpus.text.copies import without_copies
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.text_files import PAPERS, FolderWalk, TextFile, TextName, check_link, printable, utf8_name

SUFFIXES = (*compression.SUFFIXES, ".wet", ".warc")
BASE_URL = "https://data.commoncrawl.org"
LARGEST_LISTING = 256 << 20  # bytes of wet.paths, unpacked; the real ones have about 14 MB
_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class WetFile(NamedTuple):
    """One input file: `name` is its name in reports, `size` in bytes, `modified` in ns."""

    path: Path
    name: str
    size: int
    modified: int


def find_wet_files(inputs: Sequence[Path], skipped: Skipped) -> list[WetFile]:
    """Return the WET files among files and below folders, sorted by name (below folders: by relative path).

    Args:
        inputs: files and folders.
        skipped: where what is left out is counted.

    Raises:
        UserError: an input that is not there, no file at all, two files of one name, a link that leads nowhere or in a
            circle, or a file that differs from its compressed form.
    """
    found: dict[str, Path] = {}
    for entry in inputs:
        check_link(entry)
        if entry.is_dir():
            paths = _below(entry, skipped)
        elif entry.is_file():
            paths = {entry.name: entry}
        else:
            raise UserError(f"--input {entry}: no such file or folder; give WET files or the folders that hold them")
        for name, path in paths.items():
            if name in found and not path.samefile(found[name]):
                raise UserError(
                    f"--input {path}: {found[name]} has the same name; rename one, or give the folder above"
                )
            found[name] = path
    files = [TextFile(path, utf8_name(name)) for name, path in sorted(found.items())]
    files = without_copies(files, skipped, _parse_name)
    where = printable(" ".join(map(str, inputs)))
    left_out = f"left out: {', '.join(skipped.lines())}" if skipped.counts else ""
    if not files:
        wanted = f"(*.warc.wet.gz, or any of *{', *'.join(SUFFIXES)})"
        raise UserError(f"--input {where}: holds no WET file {wanted}" + (f"; {left_out}" if left_out else ""))
    if left_out:
        get_logger().info(f"{where}: {left_out}")
    return [describe(file.path, file.name) for file in files]


def describe(path: Path, name: str) -> WetFile:
    """Return a file with its size and time; both are 0 if it cannot be examined."""
    shown = utf8_name(name)
    try:
        status = path.stat()
    except OSError:
        return WetFile(path, shown, 0, 0)
    return WetFile(path, shown, status.st_size, status.st_mtime_ns)


def _below(folder: Path, skipped: Skipped) -> dict[str, Path]:
    paths, walk = {}, FolderWalk(folder, skipped)
    for path in walk.files(folder):
        if not path.name.lower().endswith(SUFFIXES):
            reason = "not_data" if PAPERS.fullmatch(path.name) else "other_suffix"
            walk.count(reason, path, f"suffix {printable(path.suffix) or 'none'}")
        elif not path.is_file():  # a pipe or a device, whatever its name: reading one might never end
            walk.count("not_a_regular_file", path)
        else:
            paths[path.relative_to(folder).as_posix()] = path
    return paths


def _parse_name(name: str) -> TextName:
    """Return a name without the suffix of a compression, and that suffix; all these files are of one form."""
    stem, dot, last = name.rpartition(".")
    compressed = dot + last.lower() in compression.SUFFIXES
    return TextName(stem, "", dot + last.lower()) if compressed else TextName(name, "", "")


def fetch_snapshot(
    snapshot: str,
    segments: str,
    base_url: str = BASE_URL,
    cache: Path = Path("cache"),
    connections: int = 2,
    patience: Patience | None = None,
) -> list[Path]:
    """Fetch the WET files of a snapshot that the cache lacks; several processes may do so at once.

    Args:
        snapshot: "2019-09", or "CC-MAIN-2019-09".
        segments: "START:STOP", lines START..STOP-1 of the snapshot's wet.paths.gz, counted from 0.
        base_url: where `crawl-data/` lies, http or https.
        cache: folder that keeps the files, laid out as on the server.
        connections: downloads at a time, over all processes that share the cache folder.
        patience: time limits and attempts; None for the defaults.

    Returns:
        The files in the listing's order, all of them whole.

    Raises:
        UserError: a wrong argument, a snapshot or file that is not there, a listing with a path that Common Crawl
            does not have, a server that does not answer, a full disk.
    """
    name, first, last = check_request(snapshot, segments, base_url, connections)
    downloads = Downloads(base_url.rstrip("/"), cache, connections, patience)
    listing = downloads.fetch([f"crawl-data/{name}/wet.paths.gz"])[0]
    lines = _read_listing(listing)
    if last > len(lines):
        raise UserError(f"--segments {segments}: {name} has {len(lines):,} WET files; STOP must not exceed that")
    pattern = re.compile(rf"crawl-data/{re.escape(name)}/segments/{_FILE_NAME}/wet/{_FILE_NAME}\.warc\.wet\.gz")
    for number, line in enumerate(lines[first:last], first):
        if not pattern.fullmatch(line) or ".." in line:  # it becomes a path below the cache folder
            raise UserError(f"{listing}: line {number} is {line[:200]!r}, no WET file of {name}; is --base-url right?")
    if len(set(lines[first:last])) < last - first:
        raise UserError(f"{listing}: names a file twice; is --base-url right?")
    return downloads.fetch(lines[first:last])


def check_request(snapshot: str, segments: str, base_url: str, connections: int) -> tuple[str, int, int]:
    """Check a request without contacting the server; return the snapshot's full name and the range of its files.

    Args:
        snapshot: see `fetch_snapshot`, as the others.
        segments: a range of files.
        base_url: of the server.
        connections: downloads at a time.

    Raises:
        UserError: one of them is wrong.
    """
    name, first, last = _snapshot_name(snapshot), *_parse_range(segments)
    try:
        address = urllib.parse.urlsplit(base_url)
    except ValueError as error:
        raise UserError(f"--base-url {base_url}: must be like {BASE_URL}") from error
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise UserError(f"--base-url {base_url}: must be like {BASE_URL}")
    if connections < 1:
        raise UserError(f"--connections {connections}: must be at least 1")
    return name, first, last


def _snapshot_name(snapshot: str) -> str:
    if not re.fullmatch(r"(CC-MAIN-)?\d{4}-\d{2}", snapshot):
        raise UserError(f"--snapshot {snapshot}: must be like 2019-09")
    return "CC-MAIN-" + snapshot.removeprefix("CC-MAIN-")


def _parse_range(segments: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", segments)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--segments {segments}: must be like 0:40, the first file and the one after the last")
    return int(match[1]), int(match[2])


def _read_listing(path: Path) -> list[str]:
    try:
        with gzip.open(path) as stream:
            data = stream.read(LARGEST_LISTING + 1)
        text = data.decode("ascii").strip()
        if not text:
            raise ValueError("it is empty")
        if len(data) > LARGEST_LISTING:
            raise ValueError(f"it unpacks to more than {LARGEST_LISTING >> 20} MB")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{path}: was not a gzipped list of paths ({error}) and is removed; run again") from error
    return [line.strip() for line in text.split("\n")]
