"""A whole training step against transformers' own class, and against the best dense head, masked or causal.

    python benchmarks/step.py [--json benchmarks/results/step.json]        about 6 minutes on one core
    python benchmarks/step.py --objective clm [--json benchmarks/results/step_clm.json]
    python benchmarks/step.py --device cuda --micro-batch 64 --precision bf16

8 layers, d = 512, N = 250,002, 2 x 512 tokens, forward, backward and AdamW, one thread on all sides. XLM-R-MEDIUM:

    transformers   XLMRobertaForMaskedLM as its run_mlm example trains it: logits at every position
    masked dense   the same encoder, dense tied decoder on the masked positions only
    positional     our model, codes by Algorithm 1, with the bias per token
    leaves         our model, codes of the shape of 128 x 128 balanced leaves, with the bias

With `--objective clm`, Llama in the same size, where all positions but the last of a row are predicted:

    transformers          LlamaForCausalLM as its run_clm example trains it
    linear cross entropy  the same network, torch's F.linear_cross_entropy at its best chunk (torch 2.13 has it; with an
                          older one this project's dense loss in blocks)
    positional            our model, codes by Algorithm 1, without a bias, as Llama has none
    leaves + bias         our model, codes of the shape of 128 x 128 balanced leaves, with a bias per token

Time is the process's own processor time on a CPU, so that other work beside disturbs it little, and wall time on a GPU.
Memory is the peak above weights, gradients and optimizer state, each variant in a fresh process. On a GPU the
transformers variant takes 16 sequences at a time and accumulates (64 would need 115 GB for logits): its memory is that
of 16 sequences.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import loss
import measuring
import torch
import tyro
from step_variants import N, Objective, causal_lm, masked_lm
from torch import Tensor

from ksub_ds.model.flops import training_flops

LENGTH = 512
CHUNKS = (64, 128, 256, 512, 1024)  # of linear_cross_entropy
TRANSFORMERS_ON_GPU = 16  # sequences; 29 GB of logits, in bf16 and float32, their softmax and their gradient


@dataclass
class Options:
    objective: Literal["mlm", "clm"] = "mlm"
    """What is trained: a masked or a causal language model."""
    micro_batch: int = 2
    """Sequences of 512 tokens per step."""
    repeats: int = 3
    """Interleaved rounds; the best counts."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast)."""
    compile: bool = False
    """torch.compile the network on every side."""
    chunk: int | None = None
    """Rows at a time of linear_cross_entropy. [the best of several]"""
    json: Path | None = None
    """Write the numbers here too."""
    memory_of: str | None = None
    """(internal) measure the peak memory of one variant in this process."""


def objective_of(options: Options) -> Objective:
    return masked_lm() if options.objective == "mlm" else causal_lm(options.chunk)


def clock_of(options: Options) -> Callable[[], float]:
    return time.process_time if options.device == "cpu" else time.perf_counter


def best_chunk(options: Options) -> int | None:
    """Return the number of rows at a time with which linear_cross_entropy is fastest; None where torch has none."""
    if options.objective == "mlm" or not loss.HAS_LINEAR_CROSS_ENTROPY:
        return None
    rows = loss.Options(positions=options.micro_batch * (LENGTH - 1), device=options.device)
    trials = {str(chunk): loss.step_of(f"linear_cross_entropy chunk {chunk}", rows) for chunk in CHUNKS}
    seconds = measuring.interleaved(trials, 1, clock_of(options))
    return int(min(seconds, key=seconds.__getitem__))


def batch(objective: Objective, options: Options) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, N, (options.micro_batch, LENGTH), generator=generator)
    return ids.to(options.device), objective.label(ids, generator).to(options.device)


def step_of(name: str, options: Options) -> Callable[[], None]:
    """One optimizer step of a variant, in training mode (dropout on). Gradients stay allocated between steps."""
    objective = objective_of(options)
    variant = objective.variants[name]
    torch.manual_seed(0)
    model = variant.build().train().to(options.device)
    if options.compile:
        model.base_model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.device == "cuda" or None)
    ids, labels = batch(objective, options)
    at_once = TRANSFORMERS_ON_GPU if name == "transformers" and options.device != "cpu" else options.micro_batch
    parts = list(zip(ids.split(at_once), labels.split(at_once), strict=True))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        for some_ids, some_labels in parts:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
                value = variant.loss(model, some_ids, some_labels)
            (value / len(parts)).backward()
        optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_of(name: str, options: Options) -> int:
    step = step_of(name, options)
    step()
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    return measuring.peak_memory(step)


def head_of(name: str, options: Options) -> Callable[[], None]:
    """Forward and backward of our head alone, on as many rows as a step predicts."""
    objective = objective_of(options)
    head = objective.variants[name].head
    model = objective.variants[name].build().to(options.device)
    targets = objective.targets(batch(objective, options)[1])
    states = torch.randn(len(targets), model.config.hidden_size, device=options.device, requires_grad=True)

    def step() -> None:
        head(model, states, targets).backward()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def flops_per_token(options: Options) -> float:
    """Operations of a token that our model with positional codes prescribes, as `ksub pretrain` counts them."""
    objective = objective_of(options)
    return training_flops(objective.variants["positional"].build(), LENGTH, objective.predicted_share)


def measure(options: Options) -> list[dict]:
    variants, clock = objective_of(options).variants, clock_of(options)
    first, second, *ours = variants
    seconds = measuring.interleaved({name: step_of(name, options) for name in variants}, options.repeats, clock)
    heads = measuring.interleaved({name: head_of(name, options) for name in ours}, max(5, options.repeats), clock)
    keys = ["objective", "micro_batch", "device", "precision", *(["chunk"] if options.chunk else [])]
    flags = [part for key in keys for part in ("--" + key.replace("_", "-"), str(getattr(options, key)))]
    memory = {name: measuring.in_fresh_process(__file__, "--memory-of", name, *flags) for name in variants}
    tokens, flops = options.micro_batch * LENGTH, flops_per_token(options)
    return [
        {
            "variant": name,
            "seconds": seconds[name],
            "tokens_per_second": tokens / seconds[name],
            "teraflops": flops * tokens / seconds[name] / 1e12,
            key_of(first): seconds[first] / seconds[name],
            key_of(second): seconds[second] / seconds[name],
            "extra_megabytes": memory[name] / 1e6,
            "memory_saved": memory[first] / memory[name],
            "head_share": heads[name] / seconds[name] if name in heads else None,
        }
        for name in variants
    ]


def key_of(reference: str) -> str:
    """Name the ratio to a reference in the JSON file."""
    return f"times_{reference.replace(' ', '_')}"


def report(rows: list[dict], objective: Objective) -> None:
    first, second, *_ = objective.variants
    shown = []
    for row in rows:
        bounds = objective.variants[row["variant"]].bounds
        checked = (
            (f"{row[key_of(first)]:.2f}", row[key_of(first)], bounds and bounds.times_first, True),
            (f"{row[key_of(second)]:.2f}", row[key_of(second)], bounds and bounds.times_second, True),
            (f"1/{row['memory_saved']:.1f}", row["memory_saved"], bounds and bounds.memory_saved, True),
            (f"{row['head_share']:.1%}" if bounds else "", row["head_share"], bounds and bounds.head_share, False),
        )
        speed = [row["variant"], f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}"]
        to_first, to_second, memory, head = (
            f"{text} {measuring.verdict(value, bound, least)}" if bound else text
            for text, value, bound, least in checked
        )
        shown.append([*speed, to_first, to_second, f"{row['extra_megabytes']:,.0f}", memory, head])
    ratios = [f"x {first}", f"x {second}"]
    header = ["variant", "s/step", "tokens/s", *ratios, "extra MB", "memory", "head share"]
    measuring.print_table(objective.title, header, shown)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_of(options.memory_of, options)))
        return
    print(measuring.machine(), file=sys.stderr)
    if options.chunk is None:
        options.chunk = best_chunk(options)
    rows = measure(options)
    report(rows, objective_of(options))
    settings = {
        "objective": options.objective,
        "micro_batch": options.micro_batch,
        "precision": options.precision,
        "compile": options.compile,
        "chunk": options.chunk,
    }
    measuring.save(options.json, settings | {"steps": rows})


if __name__ == "__main__":
    main()
