"""Files of the pages that are kept: for the next stages, and as CCNet writes them.

For the next stages: a compressed Arrow stream for each WET file, in the order of its pages. For other programs, on
request: CCNet's JSON lines, `<lang>_<bucket>_<file>.json.gz`.
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ksub_ds.common.files import atomic_path, sha256_file
from ksub_ds.corpus.commoncrawl.wet import Page


@dataclass
class Document:
    """A page after deduplication.

    Attributes:
        page: the page as it was read.
        title: its first line.
        lines: number of lines it had.
        line_ids: which of them are kept, from 0.
        text: the kept lines, joined.
        size: of the text, in UTF-8 bytes.
        language: identified; with score, bucket and perplexity filled in when the page is selected.
        language_score: in 0..1.
        bucket: all, head, middle or tail.
        perplexity: None without a language model.
    """

    page: Page
    title: str
    lines: int
    line_ids: list[int]
    text: str
    size: int
    language: str = ""
    language_score: float = 0.0
    bucket: str = ""
    perplexity: float | None = None


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "url": pa.string(),
            "date_download": pa.string(),
            "digest": pa.string(),
            "title": pa.string(),
            "raw_content": pa.large_string(),
            "original_nlines": pa.int32(),
            "original_length": pa.int32(),
            "line_ids": pa.list_(pa.int32()),
            "language": pa.string(),
            "language_score": pa.float64(),
            "perplexity": pa.float64(),
            "bucket": pa.string(),
        }
    )


class DocumentWriter:
    """Writes one file's documents, batch by batch; the file gets its name when the block ends without an error."""

    def __init__(self, path: Path):
        self._path, self._stack = path, ExitStack()

    def __enter__(self) -> "DocumentWriter":
        import pyarrow as pa

        self._schema = _schema()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
        temporary = self._stack.enter_context(atomic_path(self._path))
        sink = self._stack.enter_context(pa.OSFile(str(temporary), "wb"))
        self._stream = self._stack.enter_context(pa.ipc.new_stream(sink, self._schema, options=options))
        return self

    def write(self, documents: list[Document]) -> None:
        """Add a batch of documents."""
        import pyarrow as pa

        if not documents:
            return
        columns: list[list[Any]] = [
            [each.page.url for each in documents],
            [each.page.date for each in documents],
            [each.page.digest for each in documents],
            [each.title for each in documents],
            [each.text for each in documents],
            [each.lines for each in documents],
            [len(each.page.text) for each in documents],
            [each.line_ids for each in documents],
            [each.language for each in documents],
            [each.language_score for each in documents],
            [each.perplexity for each in documents],
            [each.bucket for each in documents],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)


def read_documents(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, list[Any]]]:
    """Yield the documents of a file, a batch at a time, as lists by column."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as stream:
        for batch in stream:
            yield {name: batch.column(name).to_pylist() for name in columns}


CCNET_NAME = re.compile(r"\w+_(head|middle|tail|all)_\d{4,}\.json\.gz")


def write_ccnet(documents: Path, unit: int, segment: str, *, folder: Path) -> dict[str, Any]:
    """Write one file's documents as CCNet's JSON lines, <lang>_<bucket>_<unit>.json.gz.

    Args:
        documents: of the stage select.
        unit: number of the WET file.
        segment: name of the WET file, CCNet's "cc_segment".
        folder: of the output.

    Returns:
        "files": path, documents and sha256 of each.
    """
    written: dict[str, int] = {}
    streams: dict[str, gzip.GzipFile] = {}
    with ExitStack() as stack:
        for batch in read_documents(documents, tuple(_schema().names)):
            for values in zip(*batch.values(), strict=True):
                record = dict(zip(batch, values, strict=True))
                name = f"{record['language']}_{record['bucket']}_{unit:04d}.json.gz"
                if name not in streams:
                    streams[name] = _open_gzip(stack, folder / name)
                streams[name].write(json.dumps(_ccnet_record(record, segment), ensure_ascii=False).encode() + b"\n")
                written[name] = written.get(name, 0) + 1
    files = [
        {"path": name, "documents": count, "sha256": sha256_file(folder / name)}
        for name, count in sorted(written.items())
    ]
    return {"files": files}


def _open_gzip(stack: ExitStack, path: Path) -> gzip.GzipFile:
    raw = stack.enter_context(stack.enter_context(atomic_path(path)).open("wb"))
    # No name and no time in the header: the same documents give the same bytes.
    return stack.enter_context(gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0))


def _ccnet_record(record: dict[str, Any], segment: str) -> dict[str, Any]:
    """Return the fields of CCNet's output, in its order; lengths are in characters."""
    text = record["raw_content"]
    try:
        domain = urlsplit(record["url"]).netloc
    except ValueError:  # "http://[" and the like
        domain = ""
    return {
        "url": record["url"],
        "date_download": record["date_download"],
        "digest": record["digest"],
        "length": len(text),
        "nlines": len(record["line_ids"]),
        "source_domain": domain,
        "title": record["title"],
        "raw_content": text,
        "original_nlines": record["original_nlines"],
        "original_length": record["original_length"],
        "line_ids": record["line_ids"],
        "language": record["language"],
        "language_score": round(record["language_score"], 2),
        "perplexity": record["perplexity"],
        "bucket": record["bucket"],
        "cc_segment": segment,
    }
