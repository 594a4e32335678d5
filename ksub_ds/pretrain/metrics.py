"""What a run reports while it trains: metrics.jsonl, evaluation.jsonl, TensorBoard, progress lines. Rank 0 only."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import MetricsWriter, Progress, get_logger
from ksub_ds.pretrain.heldout_eval import accuracy_key_of
from ksub_ds.pretrain.run_folder import RunFolder

NOTABLE_WAIT = 0.02  # share of a step that waits for data, from which on the progress line tells it


@dataclass(frozen=True)
class Work:
    """What a token of training costs, and what can be done.

    Attributes:
        flops: operations of a token, forward and backward (model/flops.py).
        peak: operations a second of all devices together, in bf16 as their makers state it; None if not known.
    """

    flops: float
    peak: float | None


class TrainingMetrics:
    """Writes one line per optimizer step and one per evaluation.

    On ranks other than 0 every method does nothing. A write that fails (a full disk) is kept in
    `problem` for the loop to raise on all ranks together.

    Args:
        folder: where the files lie.
        monitor: DeepSpeed's, which writes TensorBoard files.
        resume_step: step of the checkpoint that training starts from; later lines are dropped.
        max_steps: the last step of the run.
        work: for the share of the devices' peak rate that the model's own operations use (MFU), whatever the precision.
    """

    def __init__(self, folder: RunFolder, monitor: Any, resume_step: int, max_steps: int, work: Work):
        self.problem: UserError | None = None
        self._folder, self._monitor = folder, monitor
        self._max_steps, self._work = max_steps, work
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
            loss: nats per predicted token.
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
        line |= self._use_of_devices(step_tokens / seconds)
        self._write(self._metrics, "train", step, line)
        rate = step_tokens / self._mean_seconds
        info = {"loss": f"{loss:.4f}", "tokens/s": f"{rate:,.0f}"}
        if self._work.peak is not None:
            info["MFU"] = f"{rate * self._work.flops / self._work.peak:.1%}"
        if "peak_memory_gb" in line:
            info["memory"] = f"{line['peak_memory_gb']:.1f} GB"
        if line.get("data_wait_seconds", 0) > NOTABLE_WAIT * seconds:
            info["waits for data"] = f"{line['data_wait_seconds'] / seconds:.0%}"
        self._progress.advance(1, **info)

    def _use_of_devices(self, tokens_per_second: float) -> dict[str, float]:
        """Return how much the model computes a second on all ranks, and the most memory that rank 0's GPU has held."""
        rate = tokens_per_second * self._work.flops
        use = {"model_tflops": float(f"{rate / 1e12:.4g}")}
        if self._work.peak is not None:
            use["mfu"] = round(rate / self._work.peak, 4)
        if distributed.has_gpu():
            import torch

            use["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        return use

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        """Record one evaluation on the held-out part."""
        if not self._main:
            return
        self._write(self._evaluations, "held_out", step, {"step": step} | scores)
        rows = scores["languages"] | scores.get("pairs", {})
        if not rows:
            get_logger().warning(
                f"held out at step {step:,}: not one token to predict; raise --eval-sequences or --mlm-probability"
            )
            return
        languages = "  ".join(f"{name} {_in_words(row)}" for name, row in rows.items())
        name = accuracy_key_of(scores)
        bits = f", {_in_words(scores)}" if "bits_per_byte" in scores else ""
        get_logger().info(
            f"held out at step {step:,}: loss {scores['loss']:.4f}{bits}, {name.replace('_', ' ')} "
            f"{100 * scores[name]:.2f} %  [{languages}]"
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


def _in_words(scores: dict[str, Any]) -> str:
    """Return bits per byte, about where bytes of unknown tokens are missing, or else the loss."""
    if "bits_per_byte" not in scores:
        return f"{scores['loss']:.3f}"
    return f"{'about ' if 'unknown_tokens' in scores else ''}{scores['bits_per_byte']:.3f} bits per byte"


def _numbers(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers of a nested line as (path, value)."""
    found: list[tuple[str, float]] = []
    for key, value in line.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((prefix + key, value))
    return found
