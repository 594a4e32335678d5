"""Pretrain as usual, but one rank breaks in the middle: it raises, hangs, is stopped, or is killed.

    RANK=0 WORLD_SIZE=2 ... python tests/pretrain/broken_rank.py HOW RANK CALL --preset tiny ...

With --compile it has no compiler either.

HOW happens in the CALL-th forward pass on that rank. From then on two seconds are enough to hang: before, on a busy
machine, the imports of one rank alone may take longer.
"""

import os
import signal
import sys
import time

import torch

from ksub_ds import KSubRobertaForMaskedLM
from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.model import compilation
from ksub_ds.pretrain.__main__ import main

FORWARD = KSubRobertaForMaskedLM.forward


def mistake() -> None:
    raise UserError("the disk of this rank alone is full")


def no_compiler(*_) -> None:
    raise OSError("this rank has no compiler")


def runs_out() -> None:
    torch.empty(2**50)


def fault() -> None:
    raise KeyError("a bug on this rank alone")


BREAK = {
    "raises": fault,
    "runs out": runs_out,
    "errs": mistake,
    "hangs": lambda: time.sleep(1000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "fine": lambda: None,
}


def break_forward(how: str, call: int) -> None:
    calls = 0

    def forward(self, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == call:
            distributed.watchdog().timeout = 2
            BREAK[how]()
        return FORWARD(self, *arguments, **keywords)

    KSubRobertaForMaskedLM.forward = forward


if __name__ == "__main__":
    how, rank, call, *arguments = sys.argv[1:]
    broken = os.environ["RANK"] == rank
    break_forward(how if broken else "fine", int(call))
    compilation.BACKEND = no_compiler if broken else "eager"
    sys.exit(main(arguments))
