"""Measure the processor seconds of a training step over each fresh model, one thread, in turns.

    python experiments/equal_time/calibration.py --models MODELS --data SHARDS --rows 8 --out calibration.json

In each round every model makes one step on the same rows: forward, backward, clipping, AdamW. What counts is the
process's own processor time, so that what else runs disturbs it little and all of them alike; the median of the rounds
is taken. A plain embedding is measured in several ways, with this project's K = 1 loss and with torch's own functions
over the predicted positions: a linear layer and cross-entropy, and `F.linear_cross_entropy`. The smallest number is its
price. What DeepSpeed adds to a step is in none.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksub_ds.common.files import write_json
from ksub_ds.corpus.batches import TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.model.causal_lm import SubCausalLM
from ksub_ds.model.loading import open_model
from ksub_ds.pretrain.builders import set_dropout
from ksub_ds.pretrain.engine import build_optimizer
from ksub_ds.pretrain.prefetch import model_inputs, to_tensors

PEAK_LR, BETAS, EPSILON, WEIGHT_DECAY = 1e-3, (0.9, 0.98), 1e-6, 0.01
CHUNK = 128  # positions at a time


def project_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss as `ksub pretrain` does."""
    return model(**inputs).loss


def decoder_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what the loss of a plain embedding is made of: hidden states (P, d), targets (P,), matrix and bias."""
    masked = "masked_positions" in inputs
    # A causal network keeps keys and values for `generate` unless told not to, which its own loss does.
    kept = {} if masked else {"use_cache": False}
    states = model.base_model(inputs["input_ids"], attention_mask=inputs.get("attention_mask"), **kept)[0]
    if masked:
        hidden = model._decoder_input(states.flatten(0, 1).index_select(0, inputs["masked_positions"]))
        targets = inputs["targets"]
    else:
        hidden, targets = states[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
    return hidden, targets, model.get_input_embeddings().tables[0], model.decoder_bias


def dense_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss of a plain embedding from all its logits."""
    hidden, targets, matrix, bias = decoder_of(model, inputs)
    return F.cross_entropy(F.linear(hidden, matrix, bias), targets)


def chunked_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss of a plain embedding from the logits of some positions at a time."""
    hidden, targets, matrix, bias = decoder_of(model, inputs)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    return F.linear_cross_entropy(hidden, matrix, targets, linear_bias=bias, options=options)


# How the loss of a plain embedding may be computed, beside this project's way.
DENSE_WAYS = {"dense head": dense_loss, "linear_cross_entropy": chunked_loss}


def step_of(model: Any, batches: TrainingBatches, rows: int, loss: Callable) -> Callable[[int], float]:
    """Return a function that makes step i of a model's training and returns its processor seconds."""
    optimizer = build_optimizer(model, PEAK_LR, BETAS, EPSILON, WEIGHT_DECAY)

    def step(number: int) -> float:
        inputs = to_tensors(model_inputs(batches.batch(number, 0, rows), batches.rule, False), torch.device("cpu"))
        start = time.process_time()
        loss(model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


def main() -> None:
    """Parse the options, measure, write the seconds of all rounds and their median."""
    parser = argparse.ArgumentParser(description="Measure the processor seconds of a training step.")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of fresh.py")
    parser.add_argument("--data", type=Path, required=True, help="shards")
    parser.add_argument("--rows", type=int, required=True, help="of a step")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = ShardDataset.open(options.data, verify=False)
    steps: dict[str, Callable[[int], float]] = {}
    for folder in options.models:
        model = open_model(folder).float().train()
        set_dropout(model, 0.0)
        model.set_attn_implementation("sdpa")
        masked_share = None if isinstance(model, SubCausalLM) else 0.15
        batches = TrainingBatches(dataset, options.rows, 1.0, 0, masked_share)
        steps[folder.name] = step_of(model, batches, options.rows, project_loss)
        if len(model.get_input_embeddings().tables) == 1:
            for way, loss in DENSE_WAYS.items():
                steps[f"{folder.name}, {way}"] = step_of(model, batches, options.rows, loss)
    for step in steps.values():  # memory is first touched, codes are sorted
        step(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, options.rounds + 1):
        for name, step in steps.items():
            seconds[name].append(round(step(number), 4))
    write_json(
        options.out, {name: {"median": statistics.median(each), "rounds": each} for name, each in seconds.items()}
    )


if __name__ == "__main__":
    main()
