"""What the number of an optimizer step decides: its learning rate and the seed of its dropout.

Pretraining and fine-tuning share both functions; each says by its arguments where it differs.
"""

import hashlib


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
