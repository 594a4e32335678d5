"""Measure the processor seconds of a training step over each fresh model, one thread, in turns.

    python experiments/frontier/calibration.py --models MODELS --data SHARDS --rows 8 --out calibration.json

In each round every model makes one step on the same rows: forward, backward, clipping, AdamW. What counts is the
process's own processor time, so that what else runs disturbs it little and all of them alike; the median of the rounds
is taken. A plain embedding is measured twice, with this project's K = 1 loss and with torch's own linear layer and
cross-entropy of the masked positions; the smaller number is its price. What DeepSpeed adds to a step is in neither.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksub_ds.common.files import write_json
from ksub_ds.corpus.batches import TrainingBatches
from ksub_ds.corpus.shards.dataset import ShardDataset
from ksub_ds.model.loading import open_model
from ksub_ds.pretrain.builders import set_dropout
from ksub_ds.pretrain.engine import build_optimizer
from ksub_ds.pretrain.prefetch import model_inputs, to_tensors

PEAK_LR, BETAS, EPSILON, WEIGHT_DECAY = 1e-3, (0.9, 0.98), 1e-6, 0.01


def project_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss as `ksub pretrain` does."""
    return model(**inputs).loss


def dense_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Compute the loss of a plain embedding by torch's functions alone."""
    states = model.base_model(inputs["input_ids"], attention_mask=inputs.get("attention_mask")).last_hidden_state
    hidden = model._decoder_input(states.flatten(0, 1).index_select(0, inputs["masked_positions"]))
    logits = torch.nn.functional.linear(hidden, model.get_input_embeddings().tables[0], model.decoder_bias)
    return torch.nn.functional.cross_entropy(logits, inputs["targets"])


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
    batches = TrainingBatches(ShardDataset.open(options.data, verify=False), options.rows, 1.0, 0, 0.15)
    steps: dict[str, Callable[[int], float]] = {}
    for folder in options.models:
        model = open_model(folder).float().train()
        set_dropout(model, 0.0)
        model.set_attn_implementation("sdpa")
        steps[folder.name] = step_of(model, batches, options.rows, project_loss)
        if len(model.get_input_embeddings().tables) == 1:
            steps[f"{folder.name}, dense head"] = step_of(model, batches, options.rows, dense_loss)
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
