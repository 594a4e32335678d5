"""Token shards on disk, and reading them without copying.

    SHARDS/manifest.json                settings, counts and sha256 of every file
    SHARDS/tokenizer/                   a copy of the tokenizer, opened by transformers' AutoTokenizer
    SHARDS/<lang>/train-00000.arrow     Arrow IPC stream, column input_ids: FixedSizeList<int32>[T]
    SHARDS/<lang>/validation-00000.arrow
    SHARDS/<lang>/part.json             this language's entry of the manifest
    SHARDS/<l1>+<l2>/...                the same for a pair of languages, of which a text and its translation are rows

`datasets.Dataset.from_file` opens the .arrow files as they are. Each holds one record batch, so
that its rows are one contiguous (n, T) array in the memory map. writer.py writes them.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError, one_line
from ksub_ds.common.files import read_json, sha256_file
from ksub_ds.common.languages import LANGUAGE_CODE, LANGUAGE_PAIR

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")

_SHARD_FILE = re.compile(r"(?P<folder>[^/]+)/(?P<split>train|validation)-\d{5}\.arrow")
_GROUPS = {"languages": LANGUAGE_CODE, "pairs": LANGUAGE_PAIR}  # keys of the manifest, and how their entries are named


def is_shards(folder: str | Path) -> bool:
    """Return whether a folder holds token shards."""
    return (Path(folder) / MANIFEST).is_file()


def dataset_fingerprint(manifest: dict[str, Any]) -> str:
    """Return the sha256 of what decides the training data: format, sequence length, tokenizer, contents of files."""
    files = sorted((f["path"], f["sha256"], f["sequences"]) for f in _all_files(manifest))
    fingerprint_inputs = [manifest["format"], manifest["sequence_length"], manifest["tokenizer"]["fingerprint"], files]
    return hashlib.sha256(json.dumps(fingerprint_inputs).encode()).hexdigest()


def _all_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [file for group in _GROUPS for entry in manifest.get(group, {}).values() for file in entry["files"]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check manifest.json.

    Raises:
        UserError: missing, damaged, of another format, or with a path that leaves the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is not a folder; give a folder of token shards, which preprocessing/shard_text.py makes"
        )
    if not path.is_file():
        raise UserError(
            f"{folder}: holds no {MANIFEST}; make shards with preprocessing/shard_text.py (or let it finish)"
        )
    manifest = read_json(path)
    try:
        if manifest["format"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format is {manifest['format']!r}, this version reads {FORMAT_VERSION}; shard the text anew"
            )
        for group, form in _GROUPS.items():
            for name, entry in (manifest["languages"] if group == "languages" else manifest.get(group, {})).items():
                for file in entry["files"]:
                    match = _SHARD_FILE.fullmatch(file["path"])
                    if match is None or match["folder"] != name or not form.fullmatch(name):
                        raise UserError(
                            f"{path}: path {file['path']!r} is not <language>/<split>-<number>.arrow of language "
                            f"{name!r}; the manifest was changed by hand: shard the text anew"
                        )
        if manifest["fingerprint"] != dataset_fingerprint(manifest):
            raise UserError(
                f"{path}: fingerprint does not match its entries; the manifest was changed: shard the text anew"
            )
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}; the manifest was changed: shard the text anew") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a manifest of token shards; shard the text anew") from error
    return manifest


class ShardDataset:
    """A folder of token shards, memory-mapped.

    Attributes:
        manifest: the checked manifest.
        fingerprint: sha256 of the whole data set; a run is resumed on the same data only.
        sequence_length: T.
        languages: sorted codes of the languages that have rows.
        pairs: sorted names of the pairs of languages that have rows ("en+sw"); wherever a language is named below, a
            pair may be.
        tokenizer_folder: the copy of the tokenizer.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.sequence_length: int = manifest["sequence_length"]
        self.tokenizer_folder = folder / "tokenizer"
        self._files: dict[tuple[str, str], list[np.ndarray]] = {}
        for entry in _all_files(manifest):
            language, name = entry["path"].split("/")
            rows = _open_rows(folder / entry["path"], self.sequence_length, entry["sequences"])
            self._files.setdefault((name.split("-")[0], language), []).append(rows)
        names = sorted({name for _, name in self._files})
        self.languages = [name for name in names if not LANGUAGE_PAIR.fullmatch(name)]
        self.pairs = [name for name in names if LANGUAGE_PAIR.fullmatch(name)]
        self._tables = {
            (split, group): self._table(split, names)
            for split in SPLITS
            for group, names in (("languages", self.languages), ("pairs", self.pairs))
        }

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "ShardDataset":
        """Open shards.

        Args:
            folder: what shard_text.py wrote.
            verify: read every file once and compare its sha256 with the manifest.

        Raises:
            UserError: a shard is missing, empty, damaged or truncated.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for entry in _all_files(manifest):
            path = folder / entry["path"]
            if not path.is_file():
                raise UserError(f"{path}: this shard is missing; shard the text again")
            if path.stat().st_size == 0:
                raise UserError(f"{path}: this shard is empty; shard the text again")
        dataset = cls(folder, manifest)
        if verify:
            for path in dataset.paths():
                dataset.verify(path)
        return dataset

    def paths(self) -> list[Path]:
        """Return the paths of all shards."""
        return [self.folder / entry["path"] for entry in _all_files(self.manifest)]

    def verify(self, path: Path) -> None:
        """Read one of the shards and compare its sha256 with the manifest.

        Raises:
            UserError: it is damaged.
        """
        expected = {self.folder / entry["path"]: entry["sha256"] for entry in _all_files(self.manifest)}
        if sha256_file(path) != expected[path]:
            raise UserError(f"{path}: sha256 does not match the manifest, the shard is damaged; shard the text again")

    def check_tokenizer(self, fingerprint: str, name: str) -> None:
        """Check that the shards were made with a tokenizer.

        Args:
            fingerprint: of the tokenizer.
            name: of the tokenizer, for the message.

        Raises:
            UserError: they were made with another.
        """
        own = self.manifest["tokenizer"]["fingerprint"]
        if own != fingerprint:
            raise UserError(
                f"{self.folder}: tokenizer fingerprint is {own[:16]}, that of {name} is {fingerprint[:16]}: not the "
                "tokenizer these shards were made with; put that one back or shard the text anew"
            )

    def num_sequences(self, split: str, language: str) -> int:
        """Return the number of rows of one language and split."""
        return sum(len(rows) for rows in self._files.get((split, language), ()))

    def rows(self, split: str, language: str) -> np.ndarray:
        """Return the rows of one language and split, (n, T) int32; of a single file as a view of its memory map."""
        files = self._files.get((split, language), [])
        if len(files) == 1:
            return files[0]
        return np.concatenate([np.zeros((0, self.sequence_length), np.int32), *files])

    def gather(self, split: str, indices: np.ndarray, language: str | None = None, pairs: bool = False) -> np.ndarray:
        """Return rows by index.

        Args:
            split: "train" or "validation".
            indices: (B,) integers.
            language: that the indices count in; None = all of them, concatenated in sorted order:
            pairs: all pairs, rather than all languages.

        Returns:
            (B, T) int32.
        """
        group = "pairs" if pairs else "languages"
        starts, files = self._tables[split, group] if language is None else self._table(split, [language])
        result = np.empty((len(indices), self.sequence_length), dtype=np.int32)
        owner = np.searchsorted(starts, indices, side="right") - 1
        sources = zip(owner.tolist(), (indices - starts[owner]).tolist(), strict=True)
        for target, (file, row) in zip(result, sources, strict=True):
            target[:] = files[file][row]
        return result

    def _table(self, split: str, languages: list[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return (index of the first row of each file, the files)."""
        files = [rows for language in languages for rows in self._files.get((split, language), [])]
        lengths = np.array([len(rows) for rows in files], dtype=np.int64)
        return np.cumsum(lengths) - lengths, files


def _open_rows(path: Path, sequence_length: int, sequences: int) -> np.ndarray:
    """Return the rows of one file as a view of its memory map, (sequences, T) int32.

    Raises:
        UserError: the file is damaged, or not what the manifest says.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            batch = stream.read_next_batch()
        column = batch.column("input_ids")
        if column.type != pa.list_(pa.int32(), sequence_length):
            raise UserError(f"{path}: holds {column.type}, not rows of {sequence_length} int32; shard the text again")
        rows = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, sequence_length)
    except (pa.ArrowException, OSError, KeyError, StopIteration) as error:
        raise UserError(f"{path}: is damaged ({one_line(error)}); shard the text again") from error
    if len(rows) != sequences:
        raise UserError(f"{path}: holds {len(rows)} sequences, the manifest says {sequences}; shard the text again")
    return rows
