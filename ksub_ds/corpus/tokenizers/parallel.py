"""Tokenising batches of text in several processes, in order.

The processes are spawned (not forked: the parent's threads and locks stay out) and each opens the tokenizer once. The
result does not depend on their number.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import numpy as np

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.loading import Tokenizer

_Ids = list[np.ndarray]  # of a batch, text by text
_BATCHES_AHEAD = 2  # per process: keeps them busy without reading the whole input into memory

_process_tokenizer: Tokenizer | None = None  # of a worker process


class ParallelEncoder:
    """Encodes batches of texts with `workers` processes; 1 = in this process."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._tokenizer, self._workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # One thread each, so that N workers keep N cores busy; children inherit the environment.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer,))

    def encode(self, batches: Iterable[list[str]]) -> Iterator[tuple[list[str], _Ids]]:
        """Encode batch by batch, in the order given; at most a few batches are in memory.

        Yields:
            Texts, and the ids of each.

        Raises:
            UserError: a worker process was killed.
        """
        if self._pool is None:
            for texts in batches:
                yield texts, self._tokenizer.encode_batch(texts)
            return
        pending: deque[tuple[list[str], Future[_Ids]]] = deque()
        try:
            for texts in batches:
                pending.append((texts, self._submit(self._pool, texts)))
                if len(pending) > _BATCHES_AHEAD * self._workers:
                    texts, future = pending.popleft()
                    yield texts, future.result()
            while pending:
                texts, future = pending.popleft()
                yield texts, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers {self._workers}: a tokenising process was killed (out of memory?); use fewer workers"
            ) from error

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, texts: list[str]) -> Future[_Ids]:
        """Submit a batch with SIGINT blocked: a process started here inherits that and leaves Ctrl-C to the parent."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(_encode_in_worker, texts)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> "ParallelEncoder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokenizer: Tokenizer) -> None:
    global _process_tokenizer
    _process_tokenizer = tokenizer
    # A parent killed by SIGKILL cannot tell its workers: each watches for itself.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes only"
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> _Ids:
    assert _process_tokenizer is not None, "the worker was not started by ParallelEncoder"
    return _process_tokenizer.encode_batch(texts)
