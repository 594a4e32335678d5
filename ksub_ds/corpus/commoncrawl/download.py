"""Downloads into a cache folder that several processes share: few connections, resumed, files whole or absent.

    Downloads("https://data.commoncrawl.org", Path("cache")).fetch(["crawl-data/CC-MAIN-2019-09/wet.paths.gz"])

The folder mirrors the server's layout. A download holds the lock of its file and one of `connections` lock files, so
the limit holds for all processes together (the ranks of an MPI job), and every file is downloaded once. Failed requests
are repeated after a pause that doubles, with jitter; after a broken connection only the rest of the file is requested,
by Range. A file gets its name only when it is as long as the server said.
"""

import contextlib
import http.client
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import fsync_path
from ksub_ds.common.lock import try_lock
from ksub_ds.common.logging import Progress, get_logger

LARGEST_FILE = 4 << 30  # bytes; Common Crawl's have about 150 MB
CHUNK = 1 << 18


@dataclass(frozen=True)
class Patience:
    """How long a download waits and how often it is retried; times in seconds."""

    timeout: float = 30.0
    """Without data for so long, a connection is closed."""
    first_pause: float = 1.0
    """Pause before the second attempt; doubles with every further one, times a random 0.5..1.5."""
    longest_pause: float = 120.0
    attempts: int = 10
    """Attempts in a row without a new byte after which a download fails."""
    first_attempts: int = 4
    """The same before the server has answered for the first time: its name may be misspelt."""


class _Retry(Exception):
    """An attempt failed, but a later one may succeed; the message says how it failed."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Downloads:
    """Fetches files below a base URL into a cache folder.

    Args:
        base_url: http or https, without a slash at the end.
        cache: the folder; a file's path in it is that on the server.
        connections: downloads at a time, over all processes that share the folder.
        patience: time limits and attempts; None for the defaults.
    """

    def __init__(self, base_url: str, cache: Path, connections: int = 2, patience: Patience | None = None):
        self._base_url, self._cache, self._connections = base_url, cache, connections
        self._patience = patience or Patience()
        self._stop, self._answered = threading.Event(), threading.Event()

    def fetch(self, paths: list[str]) -> list[Path]:
        """Fetch the files that are missing and return the local files of `paths`, in that order.

        The caller has checked that every path stays below the cache folder.

        Raises:
            UserError: a file that is not there, a server that does not answer, a folder that cannot be written to.
        """
        todo: queue.Queue[str] = queue.Queue()
        for path in paths:
            if not (self._cache / path).is_file():
                todo.put(path)
        missing = todo.qsize()
        if missing:
            self._make_folder(self._cache)
            done: queue.Queue[int | BaseException] = queue.Queue()
            # Daemons: Ctrl-C must not wait for a silent server. The next run resumes what they leave.
            for _ in range(min(self._connections, missing)):
                threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
            try:
                with Progress(missing, "files", "downloading") as progress:
                    megabytes = 0.0
                    for _ in range(missing):
                        result = done.get()
                        if isinstance(result, BaseException):
                            raise result
                        megabytes += result / 1e6
                        progress.advance(1, MB=f"{megabytes:,.0f}")
            except BaseException:
                self._stop.set()
                raise
        return [self._cache / path for path in paths]

    def _work(self, todo: "queue.Queue[str]", done: "queue.Queue[int | BaseException]") -> None:
        while not self._stop.is_set():
            try:
                path = todo.get_nowait()
            except queue.Empty:
                return
            try:
                target = self._cache / path
                self._make_folder(target.parent)
                with _locked(target.with_name(f".{target.name}.lock")) as mine:
                    if mine and not target.is_file():
                        done.put(self._download(path, target))
                    elif mine:  # another process has downloaded it
                        done.put(0)
                if not mine:  # another process is downloading it: take the others first
                    todo.put(path)
                    time.sleep(0.05 + 0.1 * random.random())
            except OSError as error:
                done.put(UserError(f"--cache {self._cache}: cannot be written to ({error.strerror or error})"))
                return
            except BaseException as error:
                done.put(error)
                return

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache {folder}: cannot be made a folder ({error.strerror})") from error

    def _download(self, path: str, target: Path) -> int:
        """Download one file and return the bytes received. The caller holds the file's lock.

        Raises:
            UserError: the file is not there, or too many attempts failed.
        """
        url = f"{self._base_url}/{path}"
        partial = target.with_name(f".{target.name}.partial")
        received = failures = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                with self._connection():
                    self._attempt(url, partial)
                break
            except _Retry as failure:
                grown = max(0, (partial.stat().st_size if partial.exists() else 0) - before)
                received += grown
                failures = 1 if grown else failures + 1
                allowed = self._patience.attempts if self._answered.is_set() else self._patience.first_attempts
                if failures >= allowed or self._stop.is_set():
                    raise UserError(
                        f"{url}: {failure}, {failures} times; check --base-url, or run again later (what came is kept)"
                    ) from failure
                pause = self._patience.first_pause * 2 ** (failures - 1) * random.uniform(0.5, 1.5)
                pause = min(max(pause, failure.pause), self._patience.longest_pause)
                get_logger().info(f"{url}: {failure}; again in {pause:.1f} s")
                self._stop.wait(pause)
        received += partial.stat().st_size - before
        fsync_path(partial)
        os.replace(partial, target)
        fsync_path(target.parent)
        partial.with_suffix(".etag").unlink(missing_ok=True)
        return received

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        """Wait for one of the connections that all processes with this cache folder share."""
        while True:
            for number in random.sample(range(self._connections), self._connections):
                with _locked(self._cache / f".connection{number}.lock") as mine:
                    if mine:
                        yield
                        return
            time.sleep(0.05 + 0.1 * random.random())

    def _attempt(self, url: str, partial: Path) -> None:
        """Make one request and append to `partial` what it lacks.

        Raises:
            _Retry: the file is still not complete.
            UserError: the file is too large.
        """
        offset = partial.stat().st_size if partial.exists() else 0
        etag_path = partial.with_suffix(".etag")
        request = urllib.request.Request(url, headers={"User-Agent": "ksub_ds", "Accept-Encoding": "identity"})
        if offset:
            request.add_header("Range", f"bytes={offset}-")
            if etag_path.exists():  # if the file has changed, the server sends all of it
                request.add_header("If-Range", etag_path.read_text(encoding="ascii"))
        with _open(request, self._patience.timeout, partial, self._answered) as response:
            offset, total = _body_range(response, offset)
            if total > LARGEST_FILE:
                raise UserError(f"{url}: is said to have {total:,} bytes, more than a WET file has")
            etag = response.headers.get("ETag", "")
            if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):  # weak ones (W/...) do not work with If-Range
                etag_path.write_text(etag, encoding="ascii")
            else:
                etag_path.unlink(missing_ok=True)
            with partial.open("r+b" if partial.exists() else "wb") as stream:
                stream.truncate(offset)
                stream.seek(offset)
                while offset < total and (chunk := _read(response, min(CHUNK, total - offset))):
                    stream.write(chunk)
                    offset += len(chunk)
                    if self._stop.is_set():
                        break
        if offset < total:
            raise _Retry(f"cut after {offset:,} of {total:,} bytes")


def _open(
    request: urllib.request.Request, timeout: float, partial: Path, answered: threading.Event
) -> http.client.HTTPResponse:
    """Send a request; set `answered` when the server answers.

    Raises:
        _Retry: a later attempt may succeed.
        UserError: no later attempt will.
    """
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
        answered.set()
        return response
    except urllib.error.HTTPError as error:
        answered.set()
        if error.code == 416:  # the partial file is longer than the file: begin again
            partial.unlink(missing_ok=True)
        if error.code in (403, 408, 416, 425, 429) or error.code >= 500:  # 403 is Common Crawl's "too fast"
            after = error.headers.get("Retry-After", "")
            pause = float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0
            raise _Retry(f"status {error.code}", pause) from error
        raise UserError(
            f"{request.full_url}: status {error.code} ({error.reason}); check --snapshot and --base-url"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"no answer ({getattr(error, 'reason', None) or error})") from error


def _read(response: http.client.HTTPResponse, size: int) -> bytes:
    """Return at most `size` bytes as they arrive, so that those before a broken connection are kept.

    Raises:
        _Retry: the connection broke.
    """
    try:
        return response.read1(size)
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"cut ({error})") from error


def _body_range(response: http.client.HTTPResponse, offset: int) -> tuple[int, int]:
    """Return where in the file the body starts (0 or `offset`) and the length of the whole file.

    Raises:
        _Retry: the answer is not a part of the file, or does not give its length.
    """
    length = response.headers.get("Content-Length", "")
    if response.status == 200 and re.fullmatch(r"\d{1,18}", length):
        return 0, int(length)
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
    if response.status == 206 and match and int(match[1]) == offset and int(match[2]) == int(match[3]) - 1:
        return offset, int(match[3])
    raise _Retry(f"an answer of status {response.status} without a usable length")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yield whether an exclusive lock could be taken, without waiting; a process that ends frees it."""
    with path.open("a") as stream:
        yield try_lock(stream)
