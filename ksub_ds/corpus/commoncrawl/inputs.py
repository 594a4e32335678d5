"""The WET files of a run: files that the user has, or those of a Common Crawl snapshot, fetched into a cache folder.

    find_wet_files([Path("wet")])
    fetch_snapshot("2019-09", "0:40", "https://data.commoncrawl.org", Path("cache"))     # 40 paths under cache/

The order of the files decides which copy of a paragraph is the first.

Common Crawl's public layout: BASE/crawl-data/CC-MAIN-2019-09/wet.paths.gz lists the files of a snapshot, one path
below BASE on each line. `segments` is a range of those lines. The servers are public and answer 403 or 503 to clients
that send too many requests; download.py keeps to few connections and retries with pauses.
"""

import gzip
import os
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


def find_wet_files(inputs: Sequence[Path]) -> list[WetFile]:
    """Return the WET files among files and below folders, sorted by name (below folders: by relative path).

    Args:
        inputs: files and folders.

    Raises:
        UserError: an input that is not there, no file at all, or two files of one name.
    """
    found: dict[str, Path] = {}
    for entry in inputs:
        if entry.is_dir():
            paths = _below(entry)
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
    if not found:
        where = " ".join(map(str, inputs))
        raise UserError(f"--input {where}: holds no WET file (*.warc.wet.gz, or any of *{', *'.join(SUFFIXES)})")
    return [describe(path, name) for name, path in sorted(found.items())]


def describe(path: Path, name: str) -> WetFile:
    """Return a file with its size and time; both are 0 if it cannot be examined."""
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    try:
        status = path.stat()
    except OSError:
        return WetFile(path, shown, 0, 0)
    return WetFile(path, shown, status.st_size, status.st_mtime_ns)


def _below(folder: Path) -> dict[str, Path]:
    paths, others = {}, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            # Pipes and devices are left out, whatever their name: reading one might never end.
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and path.is_file():
                paths[path.relative_to(folder).as_posix()] = path
            else:
                others += 1
    if others:
        get_logger().info(f"{folder}: {others:,} other files left out (not *{', *'.join(SUFFIXES)})")
    return paths


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
        raise UserError(f"{path}: was no list of paths in gzip ({error}) and is removed; run again") from error
    return [line.strip() for line in text.split("\n")]
