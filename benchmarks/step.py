"""A whole XLM-R-MEDIUM training step against transformers' own class, and against a dense masked-only head.

    python benchmarks/step.py [--json benchmarks/results/step.json]        about 6 minutes on one core
    python benchmarks/step.py --device cuda --micro-batch 64 --precision bf16

8 layers, d = 512, N = 250,002, 2 x 512 tokens, forward, backward and AdamW, one thread on all sides:

    transformers   XLMRobertaForMaskedLM as its run_mlm example trains it: logits at every position
    masked dense   the same encoder, dense tied decoder on the masked positions only
    positional     our model, codes by Algorithm 1, with the bias per token
    leaves         our model, codes of the shape of 128 x 128 balanced leaves, with the bias

Memory is the peak above weights, gradients and optimizer state, each variant in a fresh process. On a GPU the
transformers variant takes 16 sequences at a time and accumulates (64 would need 115 GB for logits): its memory is that
of 16 sequences.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measuring
import torch
import torch.nn.functional as F
import tyro
from loss import leaf_codes
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, factorized_cross_entropy, positional_codes

N, LENGTH = 250_002, 512
VARIANTS = ("transformers", "masked dense", "positional", "leaves")
TRANSFORMERS_ON_GPU = 16  # sequences; 29 GB of logits, in bf16 and float32, their softmax and their gradient
FLOP_PER_TOKEN = 178e6  # encoder of 25.5M weights and 8 layers of attention over 512 tokens, forward and backward


@dataclass
class Options:
    micro_batch: int = 2
    """Sequences of 512 tokens per step."""
    repeats: int = 3
    """Interleaved rounds; the best counts."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast)."""
    compile: bool = False
    """torch.compile the encoder on every side."""
    json: Path | None = None
    """Write the numbers here too."""
    memory_of: str | None = None
    """(internal) measure the peak memory of one variant in this process."""


def batch(options: Options) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, N, (options.micro_batch, LENGTH), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
    return ids.to(options.device), labels.to(options.device)


def build(name: str) -> nn.Module:
    """The model of a variant, in training mode (dropout on)."""
    torch.manual_seed(0)
    if name in ("positional", "leaves"):
        table = positional_codes(N, 3) if name == "positional" else leaf_codes()
        return KSubRobertaForMaskedLM(KSubRobertaConfig.xlmr_medium(), table).train()
    ours = KSubRobertaConfig.xlmr_medium()
    fields = {key: getattr(ours, key) for key in XLMRobertaConfig.__dataclass_fields__ if key != "model_type"}
    return XLMRobertaForMaskedLM(XLMRobertaConfig(**fields)).train()


def loss_of(name: str, model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    if name != "masked dense":
        return model(input_ids=ids, labels=labels).loss
    masked = labels != -100
    states = model.roberta(input_ids=ids).last_hidden_state[masked]
    return F.cross_entropy(model.lm_head(states).float(), labels[masked])


def step_of(name: str, options: Options) -> Callable[[], None]:
    """One optimizer step of a variant. Gradients stay allocated between steps."""
    model = build(name).to(options.device)
    if options.compile:
        model.roberta.encoder.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.device == "cuda" or None)
    ids, labels = batch(options)
    at_once = TRANSFORMERS_ON_GPU if name == "transformers" and options.device != "cpu" else options.micro_batch
    parts = list(zip(ids.split(at_once), labels.split(at_once), strict=True))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        for some_ids, some_labels in parts:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = loss_of(name, model, some_ids, some_labels)
            (loss / len(parts)).backward()
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
    """Forward and backward of our head alone, on as many rows as a step has masked positions."""
    model = build(name).to(options.device)
    _, labels = batch(options)
    targets = labels[labels != -100]
    states = torch.randn(len(targets), model.config.hidden_size, device=options.device, requires_grad=True)

    def head() -> None:
        embedding = model.get_input_embeddings()
        factorized_cross_entropy(model.lm_head(states), embedding, targets, model.lm_head.bias).backward()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return head


def measure(options: Options) -> list[dict]:
    seconds = measuring.interleaved({name: step_of(name, options) for name in VARIANTS}, options.repeats)
    heads = measuring.interleaved({name: head_of(name, options) for name in VARIANTS[2:]}, max(5, options.repeats))
    keys = ("micro_batch", "device", "precision")
    flags = [part for key in keys for part in ("--" + key.replace("_", "-"), str(getattr(options, key)))]
    memory = {name: measuring.in_fresh_process(__file__, "--memory-of", name, *flags) for name in VARIANTS}
    tokens = options.micro_batch * LENGTH
    return [
        {
            "variant": name,
            "seconds": seconds[name],
            "tokens_per_second": tokens / seconds[name],
            "teraflops": FLOP_PER_TOKEN * tokens / seconds[name] / 1e12,
            "times_transformers": seconds["transformers"] / seconds[name],
            "times_masked_dense": seconds["masked dense"] / seconds[name],
            "extra_megabytes": memory[name] / 1e6,
            "memory_saved": memory["transformers"] / memory[name],
            "head_share": heads[name] / seconds[name] if name in heads else None,
        }
        for name in VARIANTS
    ]


def report(rows: list[dict]) -> None:
    ours = [row for row in rows if row["head_share"] is not None]
    shown = []
    for row in rows:
        checked = row in ours
        shown.append(
            [
                row["variant"],
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['times_transformers']:.2f} " + (measuring.verdict(row["times_transformers"], 6.5) * checked),
                f"{row['times_masked_dense']:.2f} " + (measuring.verdict(row["times_masked_dense"], 1.9) * checked),
                f"{row['extra_megabytes']:,.0f}",
                f"1/{row['memory_saved']:.1f} " + (measuring.verdict(row["memory_saved"], 3.5) * checked),
                f"{row['head_share']:.1%} " + measuring.verdict(row["head_share"], 0.03, False) if checked else "",
            ]
        )
    header = ["variant", "s/step", "tokens/s", "x transformers", "x masked dense", "extra MB", "memory", "head share"]
    measuring.print_table("XLM-R-MEDIUM training step", header, shown)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_of(options.memory_of, options)))
        return
    print(measuring.machine(), file=sys.stderr)
    rows = measure(options)
    report(rows)
    settings = {"micro_batch": options.micro_batch, "precision": options.precision, "compile": options.compile}
    measuring.save(options.json, settings | {"steps": rows})


if __name__ == "__main__":
    main()
