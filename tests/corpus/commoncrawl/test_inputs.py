"""inputs.py: files and folders; a snapshot from a server that stalls, breaks off, refuses, lies and ignores Range."""

import gzip
import lzma
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.commoncrawl import inputs as snapshot_module
from ksub_ds.corpus.commoncrawl.download import Patience
from ksub_ds.corpus.commoncrawl.inputs import fetch_snapshot, find_wet_files
from ksub_ds.corpus.text.skipped import Skipped

LISTING = "crawl-data/CC-MAIN-2019-09/wet.paths.gz"
IMPATIENT = Patience(timeout=0.4, first_pause=0.01, longest_pause=0.05, attempts=4, first_attempts=2)


def wet_path(number: int) -> str:
    return f"crawl-data/CC-MAIN-2019-09/segments/1550247479.{number}/wet/CC-MAIN-0001-{number:05}.warc.wet.gz"


class Server:
    """Serves `files`; `faults[path]` lists how the next requests for it fail, one each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {wet_path(n): bytes([n]) * (3 << 18) + b"end" for n in range(4)}
        self.list_files(list(self.files))
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def list_files(self, lines: list[str]) -> None:
        self.files[LISTING] = gzip.compress("".join(line + "\n" for line in lines).encode())

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        wanted = request.headers.get("Range")
        with self.lock:
            self.requests.append((path, wanted))
            fault = self.faults[path].pop(0) if self.faults.get(path) else ""
        if fault.isdecimal():
            request.send_response(int(fault))
            request.send_header("Retry-After", "999999")  # longer than a client waits
            request.end_headers()
            return
        body = self.files.get(path)
        if body is None:
            request.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and "ignore range" not in fault else 0  # type: ignore[index]
        if wanted and start >= len(body):
            request.send_error(416)
            return
        changed = request.headers.get("If-Range") not in (None, self.etag(path))
        start = 0 if changed else start
        request.send_response(206 if start else 200)
        if start:
            shift = 1 if fault == "wrong range" else 0
            request.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        if fault == "huge":
            request.send_header("Content-Length", str(1 << 50))
        elif fault != "no length":
            request.send_header("Content-Length", str(len(body) - start))
        request.send_header("ETag", self.etag(path))
        request.end_headers()
        body = body[start:]
        if fault == "slow":
            with self.lock:
                self.open += 1
                self.most_open = max(self.most_open, self.open)
            time.sleep(0.1)
            with self.lock:
                self.open -= 1
        if fault in ("cut", "stall", "ignore range and cut"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "stall":
                time.sleep(3 * IMPATIENT.timeout)
        else:
            request.wfile.write(body)

    def etag(self, path: str) -> str:
        return f'"{hash(self.files[path])}"'

    def asked(self, number: int) -> list[str | None]:
        return [wanted for path, wanted in self.requests if path == wet_path(number)]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def fetch(server: Server, cache: Path, segments: str = "0:2", **more: Any) -> list[Path]:
    return fetch_snapshot("2019-09", segments, server.url, cache, patience=IMPATIENT, **more)


def is_right(server: Server, cache: Path, paths: list[Path], first: int = 0) -> bool:
    wanted = [wet_path(number) for number in range(first, first + len(paths))]
    return paths == [cache / path for path in wanted] and all(
        (cache / path).read_bytes() == server.files[path] for path in wanted
    )


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file() and path.suffix in (".partial", ".etag")]


def test_a_range_of_files_is_fetched_once(server: Server, tmp_path: Path) -> None:
    paths = fetch(server, tmp_path, "1:3")
    assert is_right(server, tmp_path, paths, first=1)
    assert len(server.requests) == 3
    assert fetch(server, tmp_path, "1:3") == paths
    assert is_right(server, tmp_path, fetch(server, tmp_path, "0:4"))
    assert len(server.requests) == 5
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("faults", "by_range"),  # by_range: whether each request after the first asks for the rest only
    [
        (["403", "503", "500"], [False, False, False]),
        (["cut", "503", "cut"], [True, True, True]),
        (["stall"], [True]),
        (["cut", "ignore range and cut"], [True, True]),
        (["cut", "wrong range"], [True, True]),
        (["no length"], [False]),
        (["cut", "416"], [True, False]),
    ],
)
def test_a_faulty_server_is_outlasted(server: Server, tmp_path: Path, faults: list[str], by_range: list[bool]) -> None:
    server.faults[wet_path(1)] = list(faults)
    assert is_right(server, tmp_path, fetch(server, tmp_path))
    assert [wanted is not None for wanted in server.asked(1)] == [False, *by_range]
    assert leftovers(tmp_path) == []


def test_a_later_run_goes_on_where_the_first_gave_up(server: Server, tmp_path: Path) -> None:
    server.faults[wet_path(0)] = ["cut", "503", "503", "503", "503", "503"]
    with pytest.raises(UserError, match=r"status 503, 4 times; .* run again later"):
        fetch(server, tmp_path)
    assert not (tmp_path / wet_path(0)).exists()
    server.faults.clear()
    server.requests.clear()
    assert is_right(server, tmp_path, fetch(server, tmp_path))
    assert server.asked(0) == [f"bytes={len(server.files[wet_path(0)]) // 2}-"]


def test_a_file_that_changed_in_between_comes_whole(server: Server, tmp_path: Path) -> None:
    server.faults[wet_path(0)] = ["cut", "503", "503", "503", "503"]
    with pytest.raises(UserError):
        fetch(server, tmp_path, "0:1")
    server.faults.clear()
    server.files[wet_path(0)] = b"new" * 300_000
    assert is_right(server, tmp_path, fetch(server, tmp_path, "0:1"))


def test_what_waiting_does_not_fix_is_told_at_once(server: Server, tmp_path: Path) -> None:
    del server.files[wet_path(1)]
    with pytest.raises(UserError, match=r"status 404 .*check --snapshot"):
        fetch(server, tmp_path)
    assert len(server.asked(1)) == 1
    server.faults[wet_path(2)] = ["huge"]
    with pytest.raises(UserError, match="more than a WET file has"):
        fetch(server, tmp_path, "2:3")
    with pytest.raises(UserError, match=r"no answer .*, 2 times; check --base-url"):
        fetch_snapshot("2019-09", "0:1", "http://127.0.0.1:9", tmp_path / "other", patience=IMPATIENT)


@pytest.mark.parametrize(
    "line",
    [
        "crawl-data/CC-MAIN-2019-09/segments/../../../../wet/x.warc.wet.gz",
        "/etc/cron.d/x.warc.wet.gz",
        "crawl-data/CC-MAIN-2019-09/segments/1/wet/..%2fx.warc.wet.gz",
        "crawl-data/CC-MAIN-2019-09/segments/1/wet/.hidden.warc.wet.gz",
        "crawl-data/CC-MAIN-2018-09/segments/1/wet/x.warc.wet.gz",
        "http://elsewhere.example.org/x.warc.wet.gz",
        "crawl-data/CC-MAIN-2019-09/segments/1/wet/x.warc.wet.gz?y",
        wet_path(0),
        "",
    ],
)
def test_a_listing_with_strange_paths_is_refused(server: Server, tmp_path: Path, line: str) -> None:
    server.list_files([wet_path(0), line, wet_path(2)])
    with pytest.raises(UserError, match="is --base-url right"):
        fetch(server, tmp_path / "cache", "0:3")
    assert {path.name for path in tmp_path.rglob("*.gz")} == {"wet.paths.gz"}


def test_damaged_listings_are_refused_and_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = server.files[LISTING]
    for bad in (b"", b"no gzip", good[:-9], good[:40] + b"\xff" + good[41:], gzip.compress("ü".encode())):
        server.files[LISTING] = bad
        with pytest.raises(UserError, match="is removed; run again"):
            fetch(server, tmp_path)
    monkeypatch.setattr(snapshot_module, "LARGEST_LISTING", 1000)
    server.files[LISTING] = gzip.compress(b"x\n" * 100_000)
    with pytest.raises(UserError, match="unpacks to more"):
        fetch(server, tmp_path)


def test_users_mistakes(server: Server, tmp_path: Path) -> None:
    for snapshot, segments, base_url, words in (
        ("2019", "0:1", server.url, "must be like 2019-09"),
        ("../2019-09", "0:1", server.url, "must be like 2019-09"),
        ("2019-09", "3", server.url, "must be like 0:40"),
        ("2019-09", "3:3", server.url, "must be like 0:40"),
        ("2019-09", "0:99", server.url, "has 4 WET files"),
        ("2019-09", "0:1", "file:///etc", "must be like https://"),
        ("2019-09", "0:1", "data.commoncrawl.org", "must be like https://"),
        ("2019-09", "0:1", "http://[x", "must be like https://"),
    ):
        with pytest.raises(UserError, match=words):
            fetch_snapshot(snapshot, segments, base_url, tmp_path, patience=IMPATIENT)
    with pytest.raises(UserError, match="--connections 0"):
        fetch(server, tmp_path, connections=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache .*file"):
        fetch(server, tmp_path / "file")


def test_processes_share_the_cache_and_its_connections(server: Server, tmp_path: Path) -> None:
    """Three ranks fetch the same files: each is downloaded once, over two connections in all, and all ranks get all."""
    for number in range(4):
        server.faults[wet_path(number)] = ["slow"]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=fetch, args=(server, tmp_path, "0:4")) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert is_right(server, tmp_path, [tmp_path / wet_path(number) for number in range(4)])
    assert [len(server.asked(number)) for number in range(4)] == [1] * 4
    assert server.most_open == 2
    assert leftovers(tmp_path) == []


def found(*inputs: Path) -> tuple[list[str], dict[str, int]]:
    skipped = Skipped()
    return [file.name for file in find_wet_files(inputs, skipped)], dict(skipped.counts)


def test_a_folder_is_read_once_and_whole(tmp_path: Path) -> None:
    """Links are followed, hidden names and other suffixes are counted, a link that leads nowhere is refused."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    (elsewhere / "c.warc.wet.gz").write_bytes(b"c")
    names = ["a.warc.wet.gz", "sub/b.WARC.WET", "._a.warc.wet.gz", ".ipynb_checkpoints/deep/a.warc.wet.gz"]
    for name in (*names, "d.warc.wet.lz4", "e.zip", "f", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "linked").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(folder / "sub")
    skipped = Skipped()
    files = [file.name for file in find_wet_files([folder], skipped)]
    assert files == ["a.warc.wet.gz", "linked/deep/c.warc.wet.gz", "sub/b.WARC.WET"]
    assert skipped.counts == {"hidden": 2, "other_suffix": 3, "not_data": 1, "same_folder": 1}
    assert skipped.examples["other_suffix"] == "d.warc.wet.lz4: suffix .lz4"
    (elsewhere / "round").symlink_to(elsewhere.parent)
    with pytest.raises(UserError, match=r"round: is a link to .*, a folder that it lies in"):
        found(folder)
    (elsewhere / "round").unlink()
    (folder / "gone.warc.wet.gz").symlink_to(tmp_path / "nothing")
    for entry in (folder, folder / "gone.warc.wet.gz"):
        with pytest.raises(UserError, match=r"gone\.warc\.wet\.gz: is a link to .*nothing, which is not there"):
            found(entry)


def test_each_text_counts_once(tmp_path: Path) -> None:
    """Of copies and compressed forms one is read; two forms with other content, or a damaged one, are refused."""
    page = b"WARC/1.0\n" * 99
    for name, content in {
        "a.warc.wet": page,
        "a.warc.wet.gz": gzip.compress(page),
        "a.warc.wet.xz": lzma.compress(page),
        "sub/copy.warc.wet": page,
        "sub/other.warc.wet": page[::-1],  # of the same size
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert found(tmp_path) == (["a.warc.wet", "sub/other.warc.wet"], {"copy": 1, "compressed_copy": 2})
    assert found(tmp_path, tmp_path / "sub")[1] == {"copy": 3, "compressed_copy": 2}
    for content, words in (
        (gzip.compress(page + b"x"), "their contents differ"),
        (gzip.compress(page)[:-9], "damaged"),
    ):
        (tmp_path / "a.warc.wet.gz").write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.warc\.wet\.gz: beside a\.warc\.wet, .*{words}.*; remove or rename"):
            found(tmp_path)


def test_a_folder_without_a_wet_file_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.warc.wet.lz4").touch()
    with pytest.raises(UserError, match=r"holds no WET file .*; left out: other_suffix 1 \(first: a\.warc\.wet\.lz4"):
        found(tmp_path)
