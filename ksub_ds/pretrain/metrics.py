"""What a run reports while it trains: metrics.jsonl, evaluation.jsonl, TensorBoard, progress lines. Rank 0 only."""

import time
from types import TracebackType
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import MetricsWriter, Progress, get_logger
from ksub_ds.pretrain.run_folder import RunFolder


class TrainingMetrics:
    """Writes one line per optimizer step and one per evaluation.

    On ranks other than 0 every method does nothing. A write that fails (a full disk) is kept in
    `problem` for the loop to raise on all ranks together.

    Args:
        folder: where the files lie.
        monitor: DeepSpeed's, which writes TensorBoard files.
        resume_step: step of the checkpoint that training starts from; later lines are dropped.
        max_steps: the last step of the run.
    """

    def __init__(self, folder: RunFolder, monitor: Any, resume_step: int, max_steps: int):
        self.problem: UserError | None = None
        self._folder, self._monitor = folder, monitor
        self._max_steps = max_steps
        self._clock = time.perf_counter()
        self._mean_seconds: float | None = None
        self._main = distributed.is_main()
        if self._main:
            self._metrics = MetricsWriter(folder.metrics, resume_step)
            self._evaluations = MetricsWriter(folder.evaluation, resume_step)
            self._progress = Progress(max_steps, "steps", "training", done=resume_step)

    def restart_clock(self) -> None:
        """Time the next step from now: saving and evaluating are not training."""
        self._clock = time.perf_counter()

    def step(self, step: int, loss: float, step_tokens: int, **values: Any) -> None:
        """Record one optimizer step.

        Args:
            step: number of the step, from 1.
            loss: nats per masked token.
            step_tokens: input tokens of the step, over all ranks.
            **values: further values of the line; those that are None are left out.
        """
        if not self._main:
            return
        seconds = time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        self._mean_seconds = seconds if self._mean_seconds is None else 0.9 * self._mean_seconds + 0.1 * seconds
        line = {"step": step, "loss": loss} | {key: value for key, value in values.items() if value is not None}
        line["tokens_per_second"] = round(step_tokens / seconds, 1)
        line["step_seconds"] = round(seconds, 4)
        line["eta_seconds"] = round(self._mean_seconds * (self._max_steps - step), 1)
        self._write(self._metrics, "train", step, line)
        rate = step_tokens / self._mean_seconds
        self._progress.advance(1, loss=f"{loss:.4f}", **{"tokens/s": f"{rate:,.0f}"})

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        """Record one evaluation on the held-out part."""
        if not self._main:
            return
        self._write(self._evaluations, "held_out", step, {"step": step} | scores)
        languages = "  ".join(f"{name} {row['loss']:.3f}" for name, row in scores["languages"].items())
        get_logger().info(
            f"held out at step {step:,}: loss {scores['loss']:.4f}, masked accuracy "
            f"{100 * scores['masked_accuracy']:.2f} %  [{languages}]"
        )

    def _write(self, writer: MetricsWriter, group: str, step: int, line: dict[str, Any]) -> None:
        try:
            writer.write(**line)
            self._monitor.write_events(
                [(f"{group}/{key}", value, step) for key, value in _numbers(line) if key != "step"]
            )
        except OSError as error:
            self.problem = UserError(
                f"{self._folder.path}: metrics cannot be written ({error.strerror}); free some space"
            )

    def check(self) -> None:
        """Raise what went wrong while writing.

        Raises:
            UserError: the disk is full or refuses.
        """
        if self.problem:
            raise self.problem

    def __enter__(self) -> "TrainingMetrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._main:
            self._progress.__exit__(kind, error, trace)
            for writer in (self._metrics, self._evaluations):
                try:
                    writer.close()
                except OSError as failure:
                    get_logger().warning(f"{self._folder.path}: metrics cannot be flushed ({failure.strerror})")


def _numbers(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a nested line as (path, value)."""
    found: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((prefix + key, value))
    return found
