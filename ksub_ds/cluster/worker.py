"""The guardian of one rank: what DeepSpeed's launcher starts in its place.

    python -m ksub_ds.cluster.worker WORD     (WORD: an Errand, packed)

It starts `python -m ksub_ds.pretrain` and hands its lines on, each marked with host and rank:

    ksub|node2|1|start|4711        a first line; 4711 is the worker
    ksub|node2|1|line|12:03:41 step 20 ...
    ksub|node2|1|alive|            every five seconds
    ksub|node2|1|end|-9            the last line: exit code, or minus the signal

So whoever reads at the other end knows which rank on which host ended how, whatever launcher stands between.

No worker outlives its launch. The pipe to the launcher is the lifeline: when nobody holds its other end any
more (launcher killed, connection lost), the worker is asked to save and stop (SIGTERM), and killed 30
seconds later. When this process is killed, the kernel kills the worker.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

from ksub_ds.cluster.launch_spec import LAUNCH_ID, Errand
from ksub_ds.common import distributed

ALIVE_SECONDS = 5.0
GRACE_SECONDS = 30.0  # from "save and stop" to the end
LONGEST_PIECE = 3000  # bytes; with its mark it stays under PIPE_BUF, so lines of several ranks never mix
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the worker of this rank; returns its exit code, 128 + n for signal n."""
    errand = Errand.unpack(sys.argv[1])
    rank = distributed.rank()
    voice = Voice(socket.gethostname(), rank)
    try:
        os.chdir(errand.folder)
    except OSError as error:
        voice.say("line", f"error: {socket.gethostname()}: working folder {errand.folder}: {error.strerror}")
        voice.say("end", "2")
        return 2
    parent = os.getppid()
    _die_with_parent(signal.SIGTERM)
    worker = subprocess.Popen(
        [sys.executable, "-u", "-m", "ksub_ds.pretrain", *errand.arguments],
        env=os.environ | errand.environment | {LAUNCH_ID: errand.launch_id},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _die_with_parent(signal.SIGKILL),
    )
    guardian = Guardian(worker, voice, parent)
    signal.signal(signal.SIGTERM, guardian.on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker gets its own
    voice.say("start", str(worker.pid))
    threading.Thread(target=guardian.watch_lifeline, daemon=True).start()
    assert worker.stdout is not None
    voice.hand_on(worker.stdout)
    code = worker.wait()
    voice.say("end", str(code))
    return code if code >= 0 else 128 - code


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


class Voice:
    """Marked lines to the launcher. When nobody listens any more they are dropped: the worker must not notice."""

    def __init__(self, host: str, rank: int):
        self._mark = f"ksub|{host}|{rank}|"
        self._lock = threading.Lock()

    def say(self, kind: str, text: str) -> None:
        """Write one marked line."""
        with self._lock, contextlib.suppress(OSError):
            os.write(2, f"{self._mark}{kind}|{text}\n".encode(errors="replace"))

    def hand_on(self, stream: IO[bytes]) -> None:
        """Mark every line of a stream, until its end."""
        while piece := stream.readline(LONGEST_PIECE):
            self.say("line", piece.decode(errors="replace").rstrip("\n"))


class Guardian:
    """Ends the worker when its launch is gone."""

    def __init__(self, worker: "subprocess.Popen[bytes]", voice: Voice, parent: int):
        self._worker, self._voice, self._parent = worker, voice, parent
        self._ending = threading.Event()

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """DeepSpeed signals the whole tree, the worker too, and a second SIGTERM would cut its saving short.

        Only when the parent is gone does nobody else tell the worker.
        """
        if os.getppid() != self._parent:
            threading.Thread(target=self._end_worker, daemon=True).start()

    def watch_lifeline(self) -> None:
        """Tell that we live, until the other end of the pipe is closed."""
        lifeline = select.poll()
        lifeline.register(2, 0)  # asks for nothing, so it wakes only for POLLERR and POLLHUP
        last = time.monotonic()
        while not any(lifeline.poll(1000)):
            if time.monotonic() - last >= ALIVE_SECONDS:
                last = time.monotonic()
                self._voice.say("alive", "")
        self._end_worker()

    def _end_worker(self) -> None:
        if self._ending.is_set():
            return
        self._ending.set()
        self._worker.terminate()
        try:
            self._worker.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._worker.kill()


if __name__ == "__main__":
    sys.exit(main())
