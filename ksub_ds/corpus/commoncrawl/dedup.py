"""Which paragraphs are kept: exact deduplication over the whole input, in bounded memory, over any number of ranks.

The order is that of files, then pages, then paragraphs. Every file's hashes lie in a file of their own
(uint64, in order), seen as *blocks* of at most BLOCK paragraphs: what a rank holds at a time.

    exchange   Each block is reduced to its different hashes, sorted, and these go to the ranks that own
               their part of the hash space (MPI all-to-all, a block a rank and round), which append them
               to the part's file: hash space cut in equal ranges, as many as keep one part in memory.
    judge      Each part is sorted once and answers, a bit an entry: kept or not. Ordered by block, so that
               it does not matter who sent what when.
    masks      A block's bits, taken together from all parts, tell which of its paragraphs stay.

The number of parts follows from the input alone, and no file says which rank wrote it.
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

# Merged docstring, to be folded in:
# """Paragraphs of a page and their 64-bit hashes, by CCNet's rule (Wenzek et al. 2020, section 3.1).
#
# A paragraph is a line. Before hashing it is stripped, put in lower case, its digits become 0, and
# punctuation and control characters go; the hash is the first 8 bytes of the SHA-1 of the UTF-8.
# CCNet drops a fixed list of punctuation; here it is every character of Unicode's categories P* and Cc.
#
# Whole batches of pages are normalised at once by one look-up per character in a table, which costs a
# tenth of doing it line by line.
# """


_DROPPED = 0x110000  # no character


@functools.cache
def _table() -> np.ndarray:
    """(0x110000,) uint32: what each code point becomes."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category == "Nd":
            table[code] = ord("0")
        elif category[0] == "P" or category == "Cc":
            table[code] = _DROPPED
    table[ord("\n")] = ord("\n")  # parts the paragraphs
    return table


def rule() -> str:
    """What decides the hashes, for fingerprints: the rule's name and the version of Unicode."""
    return f"sha1[:8] of strip, lower, Nd to 0, drop P* and Cc; Unicode {unicodedata.unidata_version}"


def normalise(paragraphs: Sequence[str]) -> list[bytes]:
    """Each paragraph (no newline inside) as the UTF-8 that is hashed."""
    if not paragraphs:
        return []
    # A newline ends every rule that looks at neighbours (the final sigma), so all go through as one string.
    joined = "\n".join([paragraph.strip() for paragraph in paragraphs]).lower()
    codes = _table()[np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")]
    return codes[codes != _DROPPED].tobytes().decode("utf-32-le").encode().split(b"\n")


def hash_paragraphs(paragraphs: Sequence[str]) -> np.ndarray:
    """(n,) uint64 hashes of n paragraphs."""
    sha1 = hashlib.sha1
    digests = b"".join([sha1(each, usedforsecurity=False).digest()[:8] for each in normalise(paragraphs)])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


Mode = Literal["keep-first", "drop-all", "off"]
BLOCK = 1 << 20  # paragraphs
PART = 1 << 22  # entries of a part, in the mean: its sorting takes 200 MB
LEAST_PARTS = 8  # so that small inputs are exchanged as large ones are
MOST_PARTS = 1 << 15  # a memory map each, when masks are read
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
        """The `index`-th block of this file, (at most `size`,) uint64."""
        return np.fromfile(self.path, dtype=np.uint64, count=size, offset=8 * index * size)

    def num_blocks(self, size: int) -> int:
        return -(-self.paragraphs // size)


def hash_files(paths: Sequence[Path], paragraphs: Sequence[int], block: int = BLOCK) -> list[HashFile]:
    """The files in their order, with the numbers of their blocks."""
    files, first = [], 0
    for path, count in zip(paths, paragraphs, strict=True):
        files.append(HashFile(path, count, first))
        first += files[-1].num_blocks(block)
    return files


def num_parts(paragraphs: int, part: int = PART) -> int:
    """How many parts the hash space is cut into, a power of two."""
    return min(max(LEAST_PARTS, 1 << (paragraphs // part).bit_length()), MOST_PARTS)


def judge(hashes: np.ndarray, mode: Mode) -> np.ndarray:
    """Which entries of a part are kept.

    Args:
        hashes: (n,) uint64, in the order of their blocks.

    Returns:
        (n,) bool: for keep-first the entry of the first block; for drop-all the one without another.
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


def mask(block: np.ndarray, bits: np.ndarray, mode: Mode) -> np.ndarray:
    """(n,) bool, which paragraphs of a block stay, from the (entries,) answers of the parts."""
    _, first, inverse, counts = np.unique(block, return_index=True, return_inverse=True, return_counts=True)
    if mode == "drop-all":
        return (bits & (counts == 1))[inverse]
    result = np.zeros(len(block), dtype=bool)
    result[first] = bits
    return result


class Deduplication:
    """The stage over a working folder; the same calls, in the same order, on all ranks.

    Args:
        folder: where its files go; the ranks share it.
        files: every input file's hashes.
        mode: keep-first or drop-all.
        block, part: sizes, smaller for tests.
    """

    def __init__(
        self, folder: Path, files: Sequence[HashFile], mode: Mode, ranks: MPIComm, block: int = BLOCK, part: int = PART
    ):
        self._spill, self._judged = folder / "spill", folder / "judged"
        self._files, self._mode, self._ranks = files, mode, ranks
        self._block = block
        self.num_parts = num_parts(sum(file.paragraphs for file in files), part)

    def run(self) -> None:
        """Exchange and judge, unless an earlier run did."""
        if self._ranks.on_main(self._judged.is_dir):
            return
        unfinished = self._judged.with_name(".judged")
        self._ranks.on_main(lambda: _make_empty(self._spill, unfinished))
        self._exchange()
        # Equal sizes are dealt out in turn, as in the exchange: a rank reads the parts it has written.
        self._ranks.each([1] * self.num_parts, lambda part: self._judge(unfinished, part))
        self._ranks.on_main(lambda: publish_folder(unfinished, self._judged))
        self._ranks.on_main(lambda: shutil.rmtree(self._spill))

    def _exchange(self) -> None:
        """Bring every part's entries together in SPILL/<part>: segments of part, block, count, hashes."""
        mine = self._ranks.share([file.paragraphs for file in self._files])
        blocks = ((self._files[i], index) for i in mine for index in range(self._files[i].num_blocks(self._block)))
        size = self._ranks.size
        waiting: dict[int, list[np.ndarray]] = {}
        while True:
            block = next(blocks, None)
            received = self._ranks.exchange(self._outgoing(block) if block else [_NOTHING] * size)
            for segment in (each for part in received for each in _segments(part)):
                waiting.setdefault(int(segment[0]), []).append(segment)
            last = not any(self._ranks.gather(block is not None))
            if last or sum(len(each) for each in chain(*waiting.values())) > _BUFFERED:
                self._ranks.agree(lambda: self._append(waiting))
                waiting.clear()
            if last:
                return

    def _outgoing(self, block: tuple[HashFile, int]) -> list[np.ndarray]:
        """A block's entries for each rank."""
        file, index = block
        found = np.unique(file.block(index, self._block))
        borders = np.arange(1, self.num_parts, dtype=np.uint64) << np.uint64(65 - self.num_parts.bit_length())
        parts = np.split(found, np.searchsorted(found, borders))
        parcels: list[list[np.ndarray]] = [[_NOTHING] for _ in range(self._ranks.size)]
        for number, part in enumerate(parts):
            if len(part):
                head = np.array([number, file.first_block + index, len(part)], dtype=np.uint64)
                parcels[number % self._ranks.size] += [head, part]
        return [np.concatenate(parcel) for parcel in parcels]

    def _append(self, waiting: dict[int, list[np.ndarray]]) -> None:
        for part, segments in waiting.items():
            with open(self._spill / str(part), "ab") as stream:
                stream.write(np.concatenate(segments).tobytes())

    def _judge(self, folder: Path, part: int) -> None:
        """One part: which of its entries are kept, as bits, each block's on bytes of their own."""
        path = self._spill / str(part)
        content = np.fromfile(path, dtype=np.uint64) if path.exists() else _NOTHING
        segments = sorted(_segments(content), key=lambda segment: int(segment[1]))
        table = np.array([segment[1:_HEAD] for segment in segments], dtype=np.uint64).reshape(-1, 2)
        counts = table[:, 1].astype(np.int64)
        hashes = np.concatenate([_NOTHING, *(segment[_HEAD:] for segment in segments)])
        keep = judge(hashes, self._mode)
        bits = [np.packbits(piece) for piece in np.split(keep, np.cumsum(counts)[:-1])] if len(table) else []
        with open(folder / str(part), "wb") as stream:  # the folder is published as a whole
            np.array(len(table), dtype=np.uint64).tofile(stream)
            table.tofile(stream)
            np.concatenate([np.zeros(0, dtype=np.uint8), *bits]).tofile(stream)

    def masks(self, file: HashFile) -> Iterator[np.ndarray]:
        """Which paragraphs of a file are kept, block by block: (at most BLOCK,) bool."""
        parts = [np.memmap(self._judged / str(part), dtype=np.uint8, mode="r") for part in range(self.num_parts)]
        for index in range(file.num_blocks(self._block)):
            number = file.first_block + index
            pieces = [_bits_of(number, part) for part in parts]
            yield mask(file.block(index, self._block), np.concatenate(pieces), self._mode)


def _make_empty(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _segments(content: np.ndarray) -> Iterator[np.ndarray]:
    """Cut a run of segments, each a head (part, block, count) with its hashes."""
    place = 0
    while place < len(content):
        end = place + _HEAD + int(content[place + 2])
        yield content[place:end]
        place = end


def _bits_of(block: int, part: np.ndarray) -> np.ndarray:
    """(entries of this block in a judged part,) bool. A part holds n, n rows of (block, count), the bits."""
    border = 8 + 16 * int(part[:8].view(np.uint64)[0])
    table, bits = part[8:border].view(np.uint64).reshape(-1, 2), part[border:]
    place = int(np.searchsorted(table[:, 0], np.uint64(block)))
    if place == len(table) or int(table[place, 0]) != block:
        return np.zeros(0, dtype=bool)
    count = int(table[place, 1])
    start = int((table[:place, 1].astype(np.int64) + 7 >> 3).sum())
    return np.unpackbits(bits[start : start + (count + 7 >> 3)], count=count).astype(bool)
