"""The supervisor of one worker, which DeepSpeed's launcher starts in the worker's place.

    python -m ksub_ds.cluster.supervisor WORD     (WORD: a LaunchSpec, packed)

It starts `python -m ksub_ds.pretrain` and passes its output on, each line tagged with host and rank:

    ksub|node2|1|start|4711        the first line; 4711 is the worker's process id
    ksub|node2|1|line|12:03:41 step 20 ...
    ksub|node2|1|alive|            every five seconds
    ksub|node2|1|end|-9            the last line: exit code, or minus the signal

So `attempt` knows which rank on which host ended how, whatever launcher is in between.

No worker outlives its launch. The pipe to the launcher is the lifeline: when its other end is closed
(launcher killed, connection lost), the worker is asked to save and stop (SIGTERM), and killed 30 seconds
later. When the supervisor is killed, the kernel kills the worker.
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

from ksub_ds.cluster.launch_spec import LAUNCH_ID, LaunchSpec
from ksub_ds.common import distributed
from ksub_ds.common.exit_codes import USER_ERROR, exit_code_of_signal

ALIVE_SECONDS = 5.0
GRACE_SECONDS = 30.0  # from "save and stop" to the end
LONGEST_PIECE = 3000  # bytes; with its tag it stays under PIPE_BUF, so lines of several ranks never mix
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the worker of this rank; return its exit code."""
    spec = LaunchSpec.unpack(sys.argv[1])
    output = TaggedOutput(socket.gethostname(), distributed.rank())
    try:
        os.chdir(spec.folder)
    except OSError as error:
        output.write("line", f"error: {socket.gethostname()}: working folder {spec.folder}: {error.strerror}")
        output.write("end", str(USER_ERROR))
        return USER_ERROR
    parent = os.getppid()
    _die_with_parent(signal.SIGTERM)
    worker = subprocess.Popen(
        [sys.executable, "-u", "-m", "ksub_ds.pretrain", *spec.arguments],
        env=os.environ | spec.environment | {LAUNCH_ID: spec.launch_id},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _die_with_parent(signal.SIGKILL),
    )
    supervisor = WorkerSupervisor(worker, output, parent)
    signal.signal(signal.SIGTERM, supervisor.on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker gets its own
    output.write("start", str(worker.pid))
    threading.Thread(target=supervisor.watch_lifeline, daemon=True).start()
    assert worker.stdout is not None
    output.pass_on(worker.stdout)
    code = worker.wait()
    output.write("end", str(code))
    return code if code >= 0 else exit_code_of_signal(-code)


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


class TaggedOutput:
    """Tagged lines to the launcher, on stderr. Without a reader they are dropped: the worker must not notice."""

    def __init__(self, host: str, rank: int):
        self._tag = f"ksub|{host}|{rank}|"
        self._lock = threading.Lock()

    def write(self, kind: str, text: str) -> None:
        """Write one tagged line.

        Args:
            kind: start, line, alive or end.
            text: what follows the tag.
        """
        with self._lock, contextlib.suppress(OSError):
            os.write(2, f"{self._tag}{kind}|{text}\n".encode(errors="replace"))

    def pass_on(self, stream: IO[bytes]) -> None:
        """Tag every line of a stream, until its end."""
        while piece := stream.readline(LONGEST_PIECE):
            self.write("line", piece.decode(errors="replace").rstrip("\n"))


class WorkerSupervisor:
    """Reports that the worker is alive, and ends it when its launch is gone.

    Args:
        worker: the process of the rank.
        output: lines to the launcher.
        parent: id of the process that started this one.
    """

    def __init__(self, worker: "subprocess.Popen[bytes]", output: TaggedOutput, parent: int):
        self._worker, self._output, self._parent = worker, output, parent
        self._ending = threading.Event()

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """End the worker if the parent is gone; else DeepSpeed has signalled the worker as well.

        DeepSpeed signals the whole process tree, and a second SIGTERM would cut the worker's saving short.
        """
        if os.getppid() != self._parent:
            threading.Thread(target=self._end_worker, daemon=True).start()

    def watch_lifeline(self) -> None:
        """Report every few seconds that this rank is alive, until the other end of the pipe is closed."""
        lifeline = select.poll()
        lifeline.register(2, 0)  # asks for nothing, so it wakes only for POLLERR and POLLHUP
        last = time.monotonic()
        while not any(lifeline.poll(1000)):
            if time.monotonic() - last >= ALIVE_SECONDS:
                last = time.monotonic()
                self._output.write("alive", "")
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
