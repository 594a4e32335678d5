"""The signs of life that ranks leave in the store, as the watchdog of one rank reads them."""

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Signs:
    """The ranks' signs of life as one rank has seen them, by its own clock."""

    def __init__(self, world_size: int):
        now = time.monotonic()
        self._beats = [""] * world_size
        self._changed = [now] * world_size  # when the rank last gave a sign
        self._moved = now  # when any main thread last came on
        self._places: list[list[Any]] = [[-1, False, "start", ""]] * world_size  # position, waits, where, frame

    def read(self, store: Any) -> None:
        """Take in every rank's newest sign."""
        keys = [f"beat/{rank}" for rank in range(len(self._beats))]
        if not store.check(keys):
            return  # some have not begun
        now = time.monotonic()
        for rank, beat in enumerate(store.multi_get(keys)):
            text = beat.decode()
            if text != self._beats[rank] or text == "done":
                self._beats[rank], self._changed[rank] = text, now
            if text != "done":
                place = json.loads(text)[1:]
                if place[0] != self._places[rank][0]:
                    self._moved = now
                self._places[rank] = place

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have given no sign for so long."""
        now = time.monotonic()
        return [rank for rank, changed in enumerate(self._changed) if now - changed > seconds]

    def all_done(self) -> bool:
        """Whether every rank is through."""
        return all(beat == "done" for beat in self._beats)

    def standing(self) -> float:
        """Seconds since any main thread came on."""
        return time.monotonic() - self._moved

    def anyone_waits(self) -> bool:
        """Whether any rank is in a collective."""
        return any(place[1] for place in self._places)

    def hanging(self) -> tuple[int, str, str] | None:
        """(rank, where, frame) of the one that has come least far and is in no collective; None when all wait."""
        least = min(place[0] for place in self._places)
        behind = [rank for rank, place in enumerate(self._places) if place[0] == least]
        idle = [rank for rank in behind if not self._places[rank][1]]
        if not idle and len(behind) == len(self._places):
            return None
        rank = (idle or behind)[0]
        return rank, self._places[rank][2], self._places[rank][3]


def main_thread_place() -> tuple[bool, str]:
    """Whether the main thread waits in a collective, and the innermost line of Python that it is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "nothing"
    name = frame.f_code.co_filename
    # NCCL's collectives return at once; who waits for them waits where a number is read (common/distributed.py).
    waits = "/torch/distributed/" in name or "/deepspeed/" in name or name == distributed_file()
    return waits, f"{frame.f_code.co_name} ({Path(name).name}:{frame.f_lineno})"


def distributed_file() -> str:
    """The file of common/distributed.py, which imports this one."""
    return str(Path(__file__).with_name("distributed.py"))


def collectives_begun() -> int:
    """How many collectives this rank has called, DeepSpeed's among them; torch counts them for every group."""
    from torch.distributed import distributed_c10d

    total = 0
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            total += group._get_sequence_number_for_group()
    return total
