"""Text from data sets that `datasets` opens by name, read as a stream: nothing is kept on the disk.

    wikipedia              English Wikipedia (wikimedia/wikipedia, 20231101.en), one article a document
    bookcorpus             BooksCorpus, whose rows are sentences in the order of the books: rows are joined to
                           documents of about 10,000 characters
    NAME, NAME:CONFIG      any other dataset of the hub, or a local folder of one, also one of save_to_disk, with a
                           column "text"

The first two are what RoBERTa-MEDIUM is trained on. A hub dataset is taken at the commit that is found first, and
that commit is part of the fingerprint of the shards.
"""

import functools
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.corpus.text.copies import without_copies
from ksub_ds.corpus.text.layout import DEFAULT_LAYOUT, TextLayout
from ksub_ds.corpus.text.saved import is_saved, saved_files
from ksub_ds.corpus.text.skipped import Skipped
from ksub_ds.corpus.text.text_files import TextFile, printable, text_files_below

JOINED_CHARACTERS = 10_000
_TORN = (EOFError, zlib.error, lzma.LZMAError)  # what decompressors raise for a file that was cut


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub.

    Attributes:
        path: its name on the hub, or a local folder.
        config: its configuration; "{language}" is replaced.
        revision: commit, branch or reference.
        joined: whether its rows are pieces of longer documents.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    joined: bool = False


KNOWN = {
    "wikipedia": HubDataset("wikimedia/wikipedia", "20231101.{language}"),
    # The original is a loading script, which `datasets` no longer runs; this is the hub's own conversion of it.
    "bookcorpus": HubDataset("bookcorpus/bookcorpus", revision="refs/convert/parquet", joined=True),
}


class DatasetSource:
    """The train split of one dataset, as a source of documents.

    Args:
        name: one of KNOWN, NAME or NAME:CONFIG.
        language: of the text; chooses Wikipedia's edition.
        layout: which column holds the text.
        skipped: where text files of a local folder are counted that are not read.

    Raises:
        UserError: the same text twice, no such dataset or configuration, no train split, no network, no column of text.
    """

    def __init__(self, name: str, language: str, layout: TextLayout = DEFAULT_LAYOUT, skipped: Skipped | None = None):
        path, _, config = name.partition(":")
        if not path.strip("/"):
            raise UserError(f"--datasets {name or repr(name)}: write NAME, NAME:CONFIG or a folder of a dataset")
        known = KNOWN.get(path, HubDataset(path))
        self.name = name
        self._joined = known.joined
        self._path, self._revision = known.path, known.revision
        self._config = config or (known.config and known.config.format(language=language))
        self._builder = self._open()
        self._compare_with_folder(Skipped() if skipped is None else skipped)
        rows = self._stream()
        columns = rows.column_names or list(next(self._rows(), {}))
        found = [column for column in layout.columns() if column in columns]
        if not found:
            raise UserError(f"--datasets {name}: has {layout.missing(columns, _texts(rows, columns))}")
        self._column = found[0]
        self._read_only(self._column)

    def _open(self) -> Any:
        import datasets

        try:
            files = self._saved()
            if files:
                return datasets.load_dataset_builder("arrow", data_files={"train": files})
            return datasets.load_dataset_builder(self._path, self._config, revision=self._revision)
        except UserError:
            raise
        except Exception as error:  # the library raises many kinds: StopIteration for an empty file, yaml's of a README
            raise UserError(f"--datasets {self.name}: cannot be opened ({one_line(error)})") from error

    def _saved(self) -> list[str]:
        """Return the files of a data set that save_to_disk wrote, unless they are all of its folder.

        `datasets` opens such a folder by itself, but takes all its arrow files for data.

        Raises:
            UserError: a configuration is given, or the folder is damaged.
        """
        folder = Path(self._path).resolve()  # as `datasets` names files
        if not is_saved(folder):
            return []
        if self._config:
            raise UserError(f"--datasets {self.name}: a saved data set has no configuration; give its folder alone")
        files = saved_files(folder)
        others = set(files[0].parent.glob("*.arrow")) - set(files) if files else ()
        return [str(path) for path in files] if others else []

    def _compare_with_folder(self, skipped: Skipped) -> None:
        """Count the text files of a local folder that `datasets` does not read: it takes the files of one form only.

        Raises:
            UserError: two files that it reads hold the same text.
        """
        folder, splits = Path(self._path).resolve(), self._builder.config.data_files
        if not folder.is_dir() or not splits or self._config:
            return
        split_of = {Path(path).resolve(): str(split) for split, paths in splits.items() for path in paths}

        def name_of(path: Path) -> str:
            return printable(path.relative_to(folder) if path.is_relative_to(folder) else path)

        train = [TextFile(path, name_of(path)) for path, split in split_of.items() if split == "train"]
        twice = Skipped()
        if len(without_copies(train, twice)) < len(train):
            raise UserError(f"--datasets {self.name}: holds text twice: {', '.join(twice.lines())}; remove one of them")
        for path in text_files_below(folder, folder, Skipped()):
            name, split = name_of(path), split_of.get(path.resolve())
            if split is not None:
                if split != "train":
                    skipped.add("other_split", f"{name}: {split}")
            elif is_saved(folder):
                skipped.add("other_split", name)
            else:
                skipped.add("other_form", f"{name}: `datasets` reads files of one form; --input reads all")

    def _read_only(self, column: str) -> None:
        """Leave all other columns out before files are compared: one may have columns that the first has not."""
        features, cast = self._builder.info.features, getattr(self._builder, "_cast_table", None)
        if features is None or cast is None:
            return
        self._builder.info.features = type(features)({column: features[column]})

        def cast_one(table: Any, *arguments: Any, **options: Any) -> Any:
            return cast(table.select([name for name in table.column_names if name == column]), *arguments, **options)

        self._builder._cast_table = cast_one

    def _stream(self) -> Any:
        try:
            return self._builder.as_streaming_dataset(split="train")
        except Exception as error:  # as above
            raise UserError(f"--datasets {self.name}: its train split cannot be read ({one_line(error)})") from error

    @functools.cached_property
    def digest(self) -> str:
        """What decides the text: path, configuration, commit (of a local folder, its files' names and times)."""
        return f"{self._path} {self._builder.config.name} {self._builder.hash} {self._column} {self._joined}"

    @property
    def size(self) -> int:
        """Bytes of text, if the dataset says so; else 0."""
        split = (self._builder.info.splits or {}).get("train")
        return int(split.num_bytes or 0) if split else 0

    def texts(self) -> Iterator[Any]:
        """Return the documents, in order; a row whose text is not a string is returned as it is.

        Raises:
            UserError: the stream broke off.
        """
        rows = (_decoded(row.get(self._column)) for row in self._rows())
        return _join(rows) if self._joined else rows

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            yield from self._stream()
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *_TORN) as error:
            raise UserError(
                f"--datasets {self.name}: broke off ({one_line(error)}); run again, or repair its file"
            ) from error


def _join(rows: Iterable[Any]) -> Iterator[str]:
    """Yield rows joined, one a line, to documents of at least JOINED_CHARACTERS."""
    lines: list[str] = []
    size = 0
    for row in rows:
        if isinstance(row, str):
            lines.append(row)
            size += len(row) + 1
        if size >= JOINED_CHARACTERS:
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def _texts(rows: Any, columns: list[str]) -> list[str]:
    """Return the columns that hold strings, the likeliest last."""
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in (rows.features or {}).items()}
    return [name for name in reversed(columns) if kinds.get(name, "string") in _TEXT_KINDS]


_TEXT_KINDS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _decoded(value: Any) -> Any:
    """Return the string that a binary value holds; anything else as it is."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
