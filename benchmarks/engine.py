"""What DeepSpeed adds to a training step, against plain DistributedDataParallel, and what a checkpoint costs.

    python benchmarks/engine.py [--json benchmarks/results/engine.json]        about 8 minutes on two cores

XLM-R-MEDIUM with positional codes (K = 3, 26M parameters), 2 ranks on this machine, one thread each, in turns in the
same processes:

    ddp        torch's DistributedDataParallel and AdamW: one all-reduce of the gradient, no sharding
    zero0-3    the engine of `ksub pretrain` with the file of that name in ds_configs/

"fixed" steps are so short (1 x 16 tokens a rank) that the engine and its messages are all there is. "processor" seconds
are rank 0's, waiting not counted: they tell the same story on a machine that is shared.
"save" is the time that a checkpoint keeps the training waiting; "written" until it lies on the disk.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.distributed as dist
import tyro

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.common import distributed
from ksub_ds.pretrain.checkpoint import CheckpointWriter, TrainerState
from ksub_ds.pretrain.engine import (
    GuardedUpdate,
    build_optimizer,
    compose_config,
    find_deepspeed_config,
    loss_factor,
    read_mechanics,
    size_buckets,
    start_engine,
)

N = 250_002
ADAM = (2e-4, (0.9, 0.98), 1e-6, 0.01)
Step = Callable[[], None]


@dataclass
class Options:
    length: int = 512
    """Tokens of a sequence."""
    micro_batch: int = 2
    """Sequences a rank takes at once."""
    accumulation: int = 2
    """Micro-batches a rank takes for one step."""
    repeats: int = 5
    """Turns of every variant; the best step counts."""
    variants: tuple[str, ...] = ("ddp", "zero0", "zero1", "zero2", "zero3")
    """Which to measure; the first is what the others are compared with."""
    json: Path | None = None
    """Write the numbers here too."""


def batches(length: int, micro_batch: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(distributed.rank())
    ids = torch.randint(5, N, (accumulation, micro_batch, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
    labels[..., 0] = ids[..., 0]
    return [{"input_ids": part, "labels": label} for part, label in zip(ids, labels, strict=True)]


class Ddp:
    """Plain torch."""

    def __init__(self, model: Any):
        self.model = torch.nn.parallel.DistributedDataParallel(model)
        self.optimizer = build_optimizer(model, *ADAM)

    def step(self, parts: list[dict[str, torch.Tensor]]) -> None:
        """One optimizer step; gradients are exchanged with the last micro-batch only."""
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                (self.model(**part, loss_reduction="sum").loss / 100).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Zero:
    """The engine of `ksub pretrain`."""

    def __init__(self, model: Any, name: str, micro_batch: int, accumulation: int):
        config = compose_config(
            size_buckets(read_mechanics(find_deepspeed_config(name)), sum(p.numel() for p in model.parameters())),
            micro_batch_size=micro_batch,
            accumulation=accumulation,
            world_size=distributed.world_size(),
            precision="fp32",
            gradient_clipping=0.0,
        )
        self.engine = start_engine(model, build_optimizer(model, *ADAM), config)
        self.update = GuardedUpdate(self.engine, gradient_clipping=0.0)

    def step(self, parts: list[dict[str, torch.Tensor]]) -> None:
        """One optimizer step, as pretrain/loop makes it."""
        for index, part in enumerate(parts):
            self.engine.set_gradient_accumulation_boundary(index == len(parts) - 1)
            loss = self.engine(**part, loss_reduction="sum").loss
            self.engine.backward(loss * loss_factor(self.engine) / 100, scale_wrt_gas=False)
        squared_norm = distributed.sum_over_ranks(self.update.squared_gradient_norm())
        self.update.launch(loss.detach(), squared_norm, rate=ADAM[0])


def measure(options: Options) -> dict[str, Any]:
    """What one rank measures; all ranks do the same at the same time."""
    distributed.init_distributed()
    torch.set_num_threads(1)
    table = positional_codes(N, 3)
    sizes = {"fixed": (16, 1, 1), "step": (options.length, options.micro_batch, options.accumulation)}
    seconds: dict[str, dict[str, float]] = {}
    saving: dict[str, float] = {}
    for size, (length, micro_batch, accumulation) in sizes.items():
        parts = batches(length, micro_batch, accumulation)
        trainers: dict[str, Any] = {}
        for name in options.variants:
            torch.manual_seed(0)
            model = KSubRobertaForMaskedLM(KSubRobertaConfig.xlmr_medium(), table).train()
            trainers[name] = Ddp(model) if name == "ddp" else Zero(model, name, micro_batch, accumulation)
            trainers[name].step(parts)  # the first step allocates
        best = dict.fromkeys(options.variants, float("inf"))
        least = dict.fromkeys(options.variants, float("inf"))
        for _ in range(options.repeats * (3 if size == "fixed" else 1)):
            for name in options.variants:
                dist.barrier()
                start, busy = time.perf_counter(), time.process_time()
                trainers[name].step(parts)
                best[name] = min(best[name], time.perf_counter() - start)
                least[name] = min(least[name], time.process_time() - busy)
        seconds[size], seconds[f"{size}_processor"] = best, least
        if size == "step" and "zero1" in trainers:
            saving = measure_saving(trainers["zero1"].engine)
    return seconds | {"saving": saving}


def measure_saving(engine: Any) -> dict[str, float]:
    """Seconds that a checkpoint holds up rank 0, and seconds until it is whole."""
    best = {"save": float("inf"), "written": float("inf")}
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(engine, Path(folder) / "checkpoints", 1) as writer:
        for step in (1, 2, 3):
            dist.barrier()
            start = time.perf_counter()
            writer.save(TrainerState(step=step))
            best["save"] = min(best["save"], time.perf_counter() - start)
            writer.finish()
            best["written"] = min(best["written"], time.perf_counter() - start)
    return best


def report(options: Options, result: dict[str, Any]) -> None:
    first = options.variants[0]
    rows = []
    for name in options.variants:
        ratio = result["step"][name] / result["step"][first]
        bound = measuring.verdict(ratio, 1.10, at_least=False) if name == "zero1" else ""
        rows.append(
            [
                name,
                f"{1000 * result['fixed'][name]:,.0f}",
                f"{1000 * (result['fixed'][name] - result['fixed'][first]):+,.0f}",
                f"{result['step'][name]:.3f}",
                f"{result['step_processor'][name]:.3f}",
                f"{ratio:.3f} {bound}",
            ]
        )
    measuring.print_table(
        "One step, 2 ranks", ["variant", "fixed ms", f"over {first}", "s/step", "processor s", "ratio"], rows
    )
    if result["saving"]:
        saving = result["saving"]
        share = saving["save"] / result["step"]["zero1"]
        print(
            f"\nsave {saving['save']:.2f} s = {share:.2f} steps {measuring.verdict(share, 1.0, at_least=False)}, ",
            end="",
        )
        print(f"written after {saving['written']:.2f} s")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if "RANK" in os.environ:
        result = measure(options)
        if distributed.is_main():
            print(json.dumps(result))
        distributed.shutdown()
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:]]
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    output = ranks[0].communicate()[0]
    if any(rank.wait() for rank in ranks):
        sys.exit("a rank failed")
    result = json.loads(output.splitlines()[-1])
    report(options, result)
    settings = {key: getattr(options, key) for key in ("length", "micro_batch", "accumulation")}
    measuring.save(options.json, settings | result)


if __name__ == "__main__":
    main()
