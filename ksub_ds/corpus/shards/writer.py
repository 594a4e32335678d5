"""Writing token shards: the packed documents of one language as Arrow files."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path, sha256_file
from ksub_ds.corpus.shards.dataset import SPLITS
from ksub_ds.corpus.shards.packing import Packer, Packing, PairPacker

SHORTEST_SEQUENCE, LONGEST_SEQUENCE = 8, 1 << 16
ROWS_PER_FILE = 1 << 16
TOKENS_PER_FILE = 1 << 25  # 128 MiB, held in memory by a writer: fewer rows when they are long


def check_shard_settings(sequence_length: int, validation_fraction: float) -> None:
    """Check the settings that all commands which make shards share.

    Raises:
        UserError: one is out of range.
    """
    if not SHORTEST_SEQUENCE <= sequence_length <= LONGEST_SEQUENCE:
        raise UserError(f"--sequence-length {sequence_length}: must lie in {SHORTEST_SEQUENCE}..{LONGEST_SEQUENCE}")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction}: must lie in [0, 1); the default is 0.01")


class LanguageWriter:
    """Packs the encoded documents of one language, or pairs of two, and writes them, each split to files of its own.

    Args:
        folder: where the files go.
        language: its code, or the name of the pair, for the manifest.
        packing: the form of a row.
        packer: packs documents, or framed pairs.
    """

    def __init__(self, folder: Path, language: str, packing: Packing, packer: type[Packer] | type[PairPacker] = Packer):
        self._writers = {split: ShardWriter(folder, language, split, packing.sequence_length) for split in SPLITS}
        self._packers = {split: packer(packing) for split in SPLITS}
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0, "sequences": 0} for split in SPLITS}

    def add(self, split: str, documents: list[np.ndarray], num_bytes: int) -> None:
        """Add documents to a split.

        Args:
            split: "train" or "validation".
            documents: int32 ids of each, none empty.
            num_bytes: size of their text in UTF-8.
        """
        self._writers[split].write(self._packers[split].add(documents))
        count = self.counts[split]
        count["documents"] += len(documents)
        count["tokens"] += sum(map(len, documents)) - self._packers[split].framing * len(documents)
        count["bytes"] += num_bytes

    def finish(self) -> dict[str, Any]:
        """Write the remaining rows and return the counts and files for part.json."""
        for split in SPLITS:
            self._writers[split].write(self._packers[split].finish())
            self._writers[split].close()
            self.counts[split]["sequences"] = sum(file["sequences"] for file in self._writers[split].files)
        return {**self.counts, "files": [file for split in SPLITS for file in self._writers[split].files]}


def split_of(raw: bytes, fraction: float) -> str:
    """Return the split of a document by its content, so that equal documents are in the same split.

    Args:
        raw: its text in UTF-8.
        fraction: share of the split "validation".
    """
    digest = hashlib.blake2b(raw.strip(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < fraction * 2**64]


class ShardWriter:
    """Writes the rows of one language and split into numbered files of bounded size.

    Args:
        folder: where the files go.
        language: its code, or the name of the pair.
        split: "train" or "validation".
        sequence_length: T.
    """

    def __init__(self, folder: Path, language: str, split: str, sequence_length: int):
        self._folder, self._language, self._split = folder, language, split
        self._sequence_length = sequence_length
        self._rows_per_file = min(ROWS_PER_FILE, max(1, TOKENS_PER_FILE // sequence_length))
        self._rows = np.empty((self._rows_per_file, sequence_length), dtype=np.int32)  # takes memory as it is filled
        self._buffered = 0
        self.files: list[dict[str, Any]] = []  # the manifest's entries

    def write(self, rows: np.ndarray) -> None:
        """Add (n, T) int32 rows."""
        while len(rows):
            taken = rows[: self._rows_per_file - self._buffered]
            self._rows[self._buffered : self._buffered + len(taken)] = taken
            self._buffered += len(taken)
            rows = rows[len(taken) :]
            if self._buffered == self._rows_per_file:
                self._flush()

    def close(self) -> None:
        """Write the remaining rows."""
        if self._buffered:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        flat = pa.array(self._rows[: self._buffered].reshape(-1), type=pa.int32())
        column = pa.FixedSizeListArray.from_arrays(flat, self._sequence_length)
        batch = pa.RecordBatch.from_arrays([column], names=["input_ids"])
        name = f"{self._split}-{len(self.files):05d}.arrow"
        with atomic_path(self._folder / name) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            digest = sha256_file(temporary)
        self.files.append({"path": f"{self._language}/{name}", "sha256": digest, "sequences": self._buffered})
        self._buffered = 0
