"""Exact deduplication of paragraphs over the whole input, in bounded memory, on any number of ranks.

A paragraph is a line. Its 64-bit hash follows CCNet (Wenzek et al. 2020, section 3.1): it is stripped, put in lower
case, its digits become 0, punctuation and control characters are removed; the hash is the first 8 bytes of the SHA-1
of the UTF-8. CCNet removes a fixed list of punctuation; here it is every character of Unicode's categories P* and Cc.

The order is that of files, then pages, then paragraphs. The hashes of each WET file are in a file of their own
(uint64, in order), processed in *blocks* of at most BLOCK paragraphs, of which a rank holds one at a time.

    exchange   Each block is reduced to its distinct hashes, sorted, and these go to the ranks that own their part of
               the hash space (MPI all-to-all, a block for each rank and round), which append them to the part's
               file. The hash space is cut into equal ranges, enough of them that one part fits in memory.
    decide     Each part is sorted once and gives a bit for each entry: kept or not. Entries are in the order of
               their blocks, so the order of arrival does not matter.
    masks      The bits of a block, collected from all parts, say which of its paragraphs are kept.

The number of parts follows from the input alone, and no file depends on which rank wrote it.
"""

import functools
import hashlib
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from ksub_ds.common.files import publish_folder
from ksub_ds.common.mpi import MPIComm

_DROPPED = 0x110000  # not a character
_IDEOGRAPHS = 0x20000  # the planes from here on hold ideographs, tags and private characters: none of them is changed


@functools.cache
def _table() -> np.ndarray:
    """Return a (0x110000,) uint32 table of what each code point becomes."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(_IDEOGRAPHS):
        category = unicodedata.category(chr(code))
        if category == "Nd":
            table[code] = ord("0")
        elif category[0] == "P" or category == "Cc":
            table[code] = _DROPPED
    table[ord("\n")] = ord("\n")  # separates the paragraphs
    return table


def rule() -> str:
    """Return a description of what decides the hashes, for fingerprints: the rule and the version of Unicode."""
    return f"sha1[:8] of strip, lower, Nd to 0, drop P* and Cc; Unicode {unicodedata.unidata_version}"


def normalise(paragraphs: Sequence[str]) -> list[bytes]:
    """Return the UTF-8 that is hashed for each paragraph (no newline inside).

    All paragraphs are normalised together by one table look-up per character, in a tenth of the time that one at a
    time takes.
    """
    if not paragraphs:
        return []
    # A newline ends every rule that looks at neighbours (the final sigma), so all can be one string.
    joined = "\n".join([paragraph.strip() for paragraph in paragraphs]).lower()
    codes = _table()[np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")]
    return codes[codes != _DROPPED].tobytes().decode("utf-32-le").encode().split(b"\n")


def hash_paragraphs(paragraphs: Sequence[str]) -> np.ndarray:
    """Return the (n,) uint64 hashes of n paragraphs."""
    sha1 = hashlib.sha1
    digests = b"".join([sha1(each, usedforsecurity=False).digest()[:8] for each in normalise(paragraphs)])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


Mode = Literal["keep-first", "drop-all", "off"]
BLOCK = 1 << 20  # paragraphs
PART = 1 << 22  # entries of a part, on average: sorting it takes 200 MB
LEAST_PARTS = 8  # so that small inputs go the same way as large ones
MOST_PARTS = 1 << 15  # each is a memory map when masks are read
_BUFFERED = 1 << 22  # entries received before they are appended to their files
_HEAD = 3  # numbers before a segment's hashes
_NOTHING = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class HashFile:
    """The hashes of one input file's paragraphs. `first_block` counts the blocks of the files before it."""

    path: Path
    paragraphs: int
    first_block: int

    def block(self, index: int, size: int) -> np.ndarray:
        """Return the `index`-th block of this file, (at most `size`,) uint64."""
        return np.fromfile(self.path, dtype=np.uint64, count=size, offset=8 * index * size)

    def num_blocks(self, size: int) -> int:
        """Return the number of blocks of at most `size` paragraphs."""
        return -(-self.paragraphs // size)


def hash_files(paths: Sequence[Path], paragraphs: Sequence[int], block: int = BLOCK) -> list[HashFile]:
    """Return the files in their order, with the numbers of their blocks.

    Args:
        paths: of the files.
        paragraphs: number of paragraphs of each.
        block: paragraphs of a block.
    """
    files, first = [], 0
    for path, count in zip(paths, paragraphs, strict=True):
        files.append(HashFile(path, count, first))
        first += files[-1].num_blocks(block)
    return files


def num_parts(paragraphs: int, part: int = PART) -> int:
    """Return the number of parts that the hash space is cut into, a power of two."""
    return min(max(LEAST_PARTS, 1 << (paragraphs // part).bit_length()), MOST_PARTS)


def keep_mask(hashes: np.ndarray, mode: Mode) -> np.ndarray:
    """Decide which entries of a part are kept.

    Args:
        hashes: (n,) uint64, in the order of their blocks.
        mode: keep-first or drop-all.

    Returns:
        (n,) bool: with keep-first, the first entry of each hash; with drop-all, the entries whose hash occurs once.
    """
    keep = np.zeros(len(hashes), dtype=bool)
    if not len(hashes):
        return keep
    order = np.argsort(hashes, kind="stable")  # equal hashes stay in the order of their blocks
    ordered = hashes[order]
    chosen = np.append(True, ordered[1:] != ordered[:-1])
    if mode == "drop-all":
        chosen &= np.append(chosen[1:], True)
    keep[order] = chosen
    return keep


def paragraph_mask(block: np.ndarray, bits: np.ndarray, mode: Mode) -> np.ndarray:
    """Return which paragraphs of a block are kept.

    Args:
        block: (n,) hashes of its paragraphs.
        bits: (entries,) bool of its distinct hashes, sorted: which of them stay.
        mode: "keep-first" keeps the first paragraph of each, "drop-all" those that occur once.

    Returns:
        (n,) bool.
    """
    _, first, inverse, counts = np.unique(block, return_index=True, return_inverse=True, return_counts=True)
    if mode == "drop-all":
        return (bits & (counts == 1))[inverse]
    result = np.zeros(len(block), dtype=bool)
    result[first] = bits
    return result


class Deduplication:
    """The stage dedup in a working folder. All ranks call the same methods in the same order.

    Args:
        folder: where its files go, shared by the ranks.
        files: the hashes of every input file.
        mode: keep-first or drop-all.
        comm: the ranks.
        block: paragraphs of a block; tests take fewer.
        part: entries of a part; tests take fewer.
    """

    def __init__(
        self, folder: Path, files: Sequence[HashFile], mode: Mode, comm: MPIComm, block: int = BLOCK, part: int = PART
    ):
        self._spill, self._judged = folder / "spill", folder / "judged"
        self.files, self._mode, self._comm = files, mode, comm
        self._block = block
        self.num_parts = num_parts(sum(file.paragraphs for file in files), part)

    def run(self) -> None:
        """Exchange the hashes and decide which entries are kept, unless an earlier run did."""
        if self._comm.on_main(self._judged.is_dir):
            return
        unfinished = self._judged.with_name(".judged")
        self._comm.on_main(lambda: _make_empty(self._spill, unfinished))
        self._exchange()
        # Units of equal size go to the ranks in turn, as in the exchange: a rank reads the parts it has written.
        self._comm.each([1] * self.num_parts, lambda part: self._decide(unfinished, part))
        self._comm.on_main(lambda: publish_folder(unfinished, self._judged))
        self._comm.on_main(lambda: shutil.rmtree(self._spill))

    def _exchange(self) -> None:
        """Collect the entries of every part in SPILL/<part>, as segments of part, block, count, hashes."""
        mine = self._comm.share([file.paragraphs for file in self.files])
        blocks = ((self.files[i], index) for i in mine for index in range(self.files[i].num_blocks(self._block)))
        size = self._comm.size
        waiting: dict[int, list[np.ndarray]] = {}
        while True:
            block = next(blocks, None)
            received = self._comm.exchange(self._outgoing(block) if block else [_NOTHING] * size)
            for segment in (each for part in received for each in _segments(part)):
                waiting.setdefault(int(segment[0]), []).append(segment)
            last = not any(self._comm.gather(block is not None))
            if last or sum(len(each) for each in chain(*waiting.values())) > _BUFFERED:
                self._comm.agree(lambda: self._append(waiting))
                waiting.clear()
            if last:
                return

    def _outgoing(self, block: tuple[HashFile, int]) -> list[np.ndarray]:
        """Return the entries of a block that go to each rank."""
        file, index = block
        found = np.unique(file.block(index, self._block))
        borders = np.arange(1, self.num_parts, dtype=np.uint64) << np.uint64(65 - self.num_parts.bit_length())
        parts = np.split(found, np.searchsorted(found, borders))
        parcels: list[list[np.ndarray]] = [[_NOTHING] for _ in range(self._comm.size)]
        for number, part in enumerate(parts):
            if len(part):
                head = np.array([number, file.first_block + index, len(part)], dtype=np.uint64)
                parcels[number % self._comm.size] += [head, part]
        return [np.concatenate(parcel) for parcel in parcels]

    def _append(self, waiting: dict[int, list[np.ndarray]]) -> None:
        for part, segments in waiting.items():
            with open(self._spill / str(part), "ab") as stream:
                stream.write(np.concatenate(segments).tobytes())

    def _decide(self, folder: Path, part: int) -> None:
        """Decide which entries of a part are kept and write them as bits; each block starts on a new byte."""
        path = self._spill / str(part)
        content = np.fromfile(path, dtype=np.uint64) if path.exists() else _NOTHING
        segments = sorted(_segments(content), key=lambda segment: int(segment[1]))
        table = np.array([segment[1:_HEAD] for segment in segments], dtype=np.uint64).reshape(-1, 2)
        counts = table[:, 1].astype(np.int64)
        hashes = np.concatenate([_NOTHING, *(segment[_HEAD:] for segment in segments)])
        keep = keep_mask(hashes, self._mode)
        bits = [np.packbits(piece) for piece in np.split(keep, np.cumsum(counts)[:-1])] if len(table) else []
        with open(folder / str(part), "wb") as stream:  # the folder is published as a whole
            np.array(len(table), dtype=np.uint64).tofile(stream)
            table.tofile(stream)
            np.concatenate([np.zeros(0, dtype=np.uint8), *bits]).tofile(stream)

    def masks(self, file: HashFile) -> Iterator[np.ndarray]:
        """Yield which paragraphs of a file are kept, block by block: (at most BLOCK,) bool."""
        parts = [np.memmap(self._judged / str(part), dtype=np.uint8, mode="r") for part in range(self.num_parts)]
        for index in range(file.num_blocks(self._block)):
            number = file.first_block + index
            pieces = [_bits_of(number, part) for part in parts]
            yield paragraph_mask(file.block(index, self._block), np.concatenate(pieces), self._mode)


def _make_empty(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _segments(content: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the segments of an array, each a head (part, block, count) with its hashes."""
    start = 0
    while start < len(content):
        end = start + _HEAD + int(content[start + 2])
        yield content[start:end]
        start = end


def _bits_of(block: int, part: np.ndarray) -> np.ndarray:
    """Return the bits of a block's entries in a part, (entries,) bool; a part holds n, n rows (block, count), bits."""
    border = 8 + 16 * int(part[:8].view(np.uint64)[0])
    table, bits = part[8:border].view(np.uint64).reshape(-1, 2), part[border:]
    row = int(np.searchsorted(table[:, 0], np.uint64(block)))
    if row == len(table) or int(table[row, 0]) != block:
        return np.zeros(0, dtype=bool)
    count = int(table[row, 1])
    start = int((table[:row, 1].astype(np.int64) + 7 >> 3).sum())
    return np.unpackbits(bits[start : start + (count + 7 >> 3)], count=count).astype(bool)
