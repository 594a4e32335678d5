"""Run shard_cc many times in forked processes: whole; then killed at a point of each stage, and resumed.

python tests/corpus/commoncrawl/run_killed.py '{"input": [...], "tokenizer": ..., "points": [...]}' FOLDER

A point is part of a path: the run is killed (SIGKILL) when it is about to give a file or folder that name.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import XLMRobertaTokenizer  # noqa: F401 - what takes seconds is done before the forks

from ksub_ds.common.mpi import MPIComm
from ksub_ds.corpus.commoncrawl import dedup, pipeline
from ksub_ds.corpus.commoncrawl.config import ShardCC


def in_a_fork(function: Callable[[], Any]) -> int:
    """Call a function in a forked process and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_before(point: str) -> None:
    """Arrange that this process is killed when a path with `point` in it is about to get its name."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def publish(source: Any, target: Any, real: Any = real, **options: Any) -> None:
            if point in f"{target}/":
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target, **options)

        setattr(os, name, publish)


def main() -> None:
    options, folder = json.loads(sys.argv[1]), Path(sys.argv[2])

    def run(name: str, point: str | None = None) -> None:
        if point is not None:
            kill_before(point)
        settings = ShardCC(
            tokenizer=Path(options["tokenizer"]),
            out=folder / name / "out",
            input=tuple(map(Path, options["input"])),
            text_out=folder / name / "text",
            sequence_length=64,
            min_length=200,
        )
        pipeline.shard_cc(settings, MPIComm())

    identifier = pipeline.load_identifier()
    dedup.normalise(["warm"])
    pipeline.load_identifier = lambda *options: identifier
    assert in_a_fork(lambda: run("whole")) == 0
    for number, point in enumerate(options["points"]):
        status = in_a_fork(lambda: run(str(number), point))  # noqa: B023 - called at once
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        assert not (folder / str(number) / "out" / "manifest.json").exists(), point
        assert in_a_fork(lambda: run(str(number))) == 0  # noqa: B023


if __name__ == "__main__":
    main()
