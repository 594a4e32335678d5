"""Deduplication: the rule of a paragraph's hash, and the stage against a set in memory."""

import hashlib
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl import dedup
from ksub_ds.corpus.commoncrawl.dedup import Deduplication, hash_files, hash_paragraphs, normalise


def plain_rule(paragraph: str) -> bytes:
    """Apply the rule as it is written, one character at a time."""
    text = re.sub(r"\d", "0", paragraph.strip().lower())
    return "".join(c for c in text if unicodedata.category(c)[0] != "P" and unicodedata.category(c) != "Cc").encode()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=12), max_size=8))
def test_the_hash_is_the_rules(paragraphs: list[str]) -> None:
    assert normalise(paragraphs) == [plain_rule(each) for each in paragraphs]
    expected = [int.from_bytes(hashlib.sha1(plain_rule(each)).digest()[:8], "big") for each in paragraphs]
    assert hash_paragraphs(paragraphs).tolist() == expected


def test_the_planes_that_the_rule_does_not_look_at_hold_nothing_to_change() -> None:
    """A newer Unicode may put punctuation or digits there: then the table has to go further."""
    kinds = {unicodedata.category(chr(code)) for code in range(0x20000, 0x110000)}
    assert not [kind for kind in kinds if kind == "Nd" or kind == "Cc" or kind.startswith("P")], kinds


def test_what_the_rule_makes_equal() -> None:
    same = ["  Call 0800-123: now! ", "call 0800123 now", "CALL ٠٨٠٠١٢٣ „now“", "\tcall 0\x000000—00 now\x85"]
    assert len(set(normalise(same))) == 1
    # The final sigma depends on its neighbours, which must not reach into the next paragraph.
    assert normalise(["ΟΔΟΣ", "ΟΔΟΣΑ", "İ"]) == ["οδος".encode(), "οδοσα".encode(), "i̇".encode()]
    assert normalise(["", "---", " "]) == [b"", b"", b""]


def expected_masks(files: list[list[int]], mode: str) -> list[list[bool]]:
    counts = Counter(value for file in files for value in file)
    seen: set[int] = set()
    masks = []
    for file in files:
        masks.append([])
        for value in file:
            masks[-1].append(value not in seen if mode == "keep-first" else counts[value] == 1)
            seen.add(value)
    return masks


def masks_of(
    folder: Path, files: list[list[int]], mode: Literal["keep-first", "drop-all"], block: int, part: int
) -> list[list[bool]]:
    paths = []
    for number, values in enumerate(files):
        paths.append(folder / f"{number}.hashes")
        np.array(values, dtype=np.uint64).tofile(paths[-1])
    hashes = hash_files(paths, [len(values) for values in files], block)
    stage = Deduplication(folder / "work", hashes, mode, MPIComm(), block, part)
    stage.run()
    assert not (folder / "work" / "spill").exists()
    return [[bool(bit) for mask in stage.masks(each) for bit in mask] for each in hashes]


VALUES = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_like_a_set_in_memory(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    pool = data.draw(st.lists(VALUES, min_size=1, max_size=12))
    files = data.draw(st.lists(st.lists(st.sampled_from(pool), max_size=25), min_size=1, max_size=4))
    mode = data.draw(st.sampled_from(["keep-first", "drop-all"]))
    block, part = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "LEAST_PARTS", 1)
        patch.setattr(dedup, "_BUFFERED", data.draw(st.integers(1, 50)))
        found = masks_of(tmp_path_factory.mktemp("dedup"), files, mode, block, part)
    assert found == expected_masks(files, mode)


def test_the_number_of_parts_follows_from_the_input() -> None:
    assert [dedup.num_parts(n) for n in (0, 10**6, 10**8, 10**9)] == [8, 8, 32, 256]
    entries_per_part = 10**9 / dedup.num_parts(10**9)
    assert entries_per_part <= dedup.PART
