"""What the number of an optimizer step decides: its learning rate and the seed of its dropout.

Pretraining and fine-tuning share both functions; each says by its arguments where it differs. A pretraining has a
`TrainingPlan`, which may be replaced while it goes on (`ksub pretrain --extend`).
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["linear", "cosine", "wsd"]


@dataclass(frozen=True)
class TrainingPlan:
    """How many steps a pretraining makes, and at which learning rates.

    After a linear warm-up to the peak comes one of

    linear    a line down, as in the paper;
    cosine    half a cosine down (Loshchilov and Hutter, SGDR, arXiv 1608.03983);
    wsd       warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395): the peak, until the last `decay_steps`
              come down by 1 - sqrt. Of the forms that Haegele et al. (arXiv 2405.18392) compare, that one ends at the
              lowest loss, over 10 to 20 % of the steps as low as a cosine; ModernBERT (arXiv 2412.13663), a masked
              language model, uses it too. MiniCPM and SmolLM2 (arXiv 2502.02737) decay over 10 %.

    All would come to 0 in the step after the last, so that no step is wasted.

    Attributes:
        schedule: the form.
        peak: the rate at the end of the warm-up.
        warmup_steps: steps of warm-up; 0 for none.
        max_steps: number of the last step.
        decay_steps: steps of wsd's decay; 0 ends at the peak.
    """

    schedule: Schedule
    peak: float
    warmup_steps: int
    max_steps: int
    decay_steps: int = 0

    @property
    def steady_until(self) -> int:
        """The last step whose rate says nothing about the end: any plan that is as steady has trained the same."""
        return self.max_steps - self.decay_steps if self.schedule == "wsd" else self.warmup_steps

    @property
    def decay_begins_after(self) -> int | None:
        """The last step before wsd's decay, whose checkpoint is kept: an extension goes on there. None without one."""
        return self.steady_until if self.decay_steps else None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 1 to `max_steps`."""
        warmup, last = self.warmup_steps, self.max_steps
        if self.schedule == "linear" or step <= warmup:
            return learning_rate(step, peak=self.peak, warmup_steps=warmup, max_steps=last, decay_from=warmup)
        if self.schedule == "cosine":
            return self.peak * (1 + math.cos(math.pi * (step - warmup) / (last - warmup + 1))) / 2
        decayed = max(0, step - self.steady_until)
        return self.peak * (1 - math.sqrt(decayed / (self.decay_steps + 1)))

    def describe(self) -> str:
        """Return the plan in words."""
        then = {"linear": "then linearly down", "cosine": "then down by half a cosine", "wsd": "then steady to the end"}
        words = then[self.schedule]
        if self.decay_steps:
            words = f"then steady, and down by 1 - sqrt over the last {self.decay_steps:,}"
        return f"{self.max_steps:,}, learning rate to {self.peak:g} over {self.warmup_steps:,} steps, {words}"

    def changeable(self) -> dict[str, Any]:
        """Return what an extension may change, as JSON values."""
        return {"max_steps": self.max_steps, "schedule": self.schedule} | (
            {"decay_steps": self.decay_steps} if self.schedule == "wsd" else {}
        )


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, decay_from: int) -> float:
    """Return the learning rate of an optimizer step: linear warm-up to the peak, then linear decay.

    The first step trains at peak / warmup_steps and the last one above 0, so no step is wasted.

    Args:
        step: number of the step, from 1 to `max_steps`.
        peak: the rate at the end of the warm-up.
        warmup_steps: steps of warm-up; 0 for none.
        max_steps: number of the last step; the rate would be 0 in the step after it.
        decay_from: the step whose rate is the peak and from which the decay counts. Pretraining counts from the last
            step of the warm-up; fine-tuning from the step after it, as transformers' linear schedule does.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * (max_steps - step + 1) / (max_steps - decay_from + 1)


def dropout_seed(purpose: str, seed: int, step: int, part: int) -> int:
    """Return the seed of the dropout in one part of one step's batch.

    Args:
        purpose: "dropout" in pretraining, "fine-tuning" there; the two must not draw alike.
        seed: the seed of the run.
        step: number of the step, counted as the caller does.
        part: number of the micro-batch, or of the rank that takes this part of the batch.
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}/{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
