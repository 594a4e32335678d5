"""Times of a training step on an H100, derived and not measured: operations, bytes and launches over assumed rates.

    python benchmarks/gpu/cost_model.py [--json benchmarks/results/gpu_derived.json]

Times are in seconds, sizes in bytes, rates per second. Legend: T tokens, R masked rows, N tokens of the vocabulary, d
the model's width, S positions of a sequence; a box of codes has `first x second x third` cells (128 x 128 x 128 for
XLM-R's clustered codes, 63^3 for positional ones).

What is assumed, so that a measurement can say which assumption was wrong:

    rates         what large kernels reach on an H100 SXM, not the data sheet's peaks (`Rates`); an H200 has 1.6 times
                  the bandwidth. `run.py --only machine` measures each.
    matrix        2 m n k operations; 58 % of the rate at the width of 512, 75 % at the feed-forward's 2,048
    elementwise   the number of times that a layer's T x d activations go through memory: 23 forward and 46 backward in
                  eager mode, 16 and 28 compiled, 10 and 22 where norm, gelu and dropout end in the products
    attention     4 T S d operations forward, 2.5 times that backward, at the rates of torch's flash attention, of a
                  compiled one and of FlashAttention 3
    launches      no kernel under 3 us; 6.5 us of the host for each in eager mode
    torch form    the loss with W written out: W goes through memory five times, six with a bias, and its products are
                  in float32; scores in float64
    fused form    two products over the box in bf16 parts (three products for one in float32, two without a bias, whose
                  box is of zeros and ones), a third for the gradient of the bias, whose steps are added up outside the
                  tensor cores; per row block and first code the longer of tensor cores and L2
    plain         N logits of a block of rows at a time; products in bf16 parts, six for the logits and three for each
                  gradient, at 75 % of the rate; 17 passes over rows x N numbers, by torch's kernels
    engine        the gaps that nobody counts: 0.8 ms a micro-batch where the host waits for the device, 0.35 ms of
                  hooks, 3 ms a step of optimizer and reading
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # measuring.py
import measuring


@dataclass(frozen=True)
class Rates:
    """What a kernel reaches on an H100 SXM; operations and bytes a second, and seconds of a launch."""

    bf16: float = 800e12
    tf32: float = 400e12
    fp32: float = 50e12
    fp64: float = 45e12
    memory: float = 3.0e12
    cache: float = 5.5e12  # L2
    clock: float = 1.755e9
    processors: int = 132
    products_a_cycle: int = 2048  # multiply-adds of bf16 a cycle and processor
    smallest_kernel: float = 3.0e-6
    host_launch: float = 6.5e-6


@dataclass(frozen=True)
class Network:
    """XLM-R-MEDIUM."""

    width: int = 512
    layers: int = 8
    inner: int = 2048
    length: int = 512
    vocabulary: int = 250_002
    masked: float = 0.15
    flops_a_token: float = 176.2e6  # of the encoder, forward and backward
    step_tokens: int = 131_072


RATES, NETWORK = Rates(), Network()
MILLISECOND = 1e-3

# How the encoder is computed: attention's operations a second forward and backward, passes of a layer's activations
# through memory forward and backward, passes of the embedding.
ENCODERS = {
    "eager": (240e12, 200e12, 23, 46, 22),
    "compiled": (300e12, 230e12, 16, 28, 12),
    "fused": (420e12, 340e12, 10, 22, 10),  # no dropout, FlashAttention 3, gelu in the epilogue, one product for QKV
}


def encoder(tokens: int, how: str) -> dict[str, float]:
    """Forward and backward of the encoder, by kind of work."""
    forward, backward, passes, passes_back, embedding = ENCODERS[how]
    d, inner = NETWORK.width, NETWORK.inner

    def product(columns: int, depth: int, efficiency: float) -> float:
        return 2 * tokens * columns * depth / (RATES.bf16 * efficiency)

    qkv_and_output = 4 * product(d, d, 0.58) if how == "eager" else product(3 * d, d, 0.70) + product(d, d, 0.58)
    attention = 4 * tokens * NETWORK.length * d
    activations = tokens * d * 2 / RATES.memory
    return {
        "products": NETWORK.layers * 3 * (qkv_and_output + 2 * product(inner, d, 0.75)),
        "attention": NETWORK.layers * (attention / forward + 2.5 * attention / backward),
        "elementwise": NETWORK.layers * (passes + passes_back) * activations / 0.93,
        "embedding": embedding * activations + 0.75 * MILLISECOND * tokens / 32768,
    }


def head(rows: int) -> float:
    """The dense layer, gelu and norm before the loss, and the gather of the masked rows."""
    products = 6 * rows * NETWORK.width**2 / (RATES.bf16 * 0.4)
    return products + 30 * rows * NETWORK.width * 2 / RATES.memory + 25 * RATES.smallest_kernel


@dataclass(frozen=True)
class Codes:
    """The box of a code table; the torch form of positional codes without a bias needs no leaves at all."""

    first: int
    second: int
    third: int

    @property
    def leaves(self) -> int:
        return self.first * self.second


CLUSTERED, POSITIONAL = Codes(128, 128, 128), Codes(63, 63, 63)


def torch_loss(rows: int, codes: Codes, bias: bool) -> float:
    """The loss by torch's products, with W (rows x leaves) written out."""
    d, size = NETWORK.width, codes.third
    product_rate = RATES.fp32 if size >= 128 else 0.7 * RATES.fp32
    leaves = 2 * rows * codes.leaves * size * (3 if bias else 2) / product_rate
    traffic = rows * codes.leaves * 4 / RATES.memory * (1 + 2 / 0.7 + 1)
    scores = 2 * rows * d * size / RATES.fp64 + rows * d * 10 / RATES.memory
    gradients = 4 * rows * d * size / RATES.fp32 + 6 * rows * d * 4 / RATES.memory
    small = (113 if bias else 96) * RATES.smallest_kernel + rows * 3 * size * 8 * 14 / RATES.memory
    return leaves + traffic + scores + gradients + small


def merged_loss(rows: int, codes: Codes = POSITIONAL) -> float:
    """The torch form for positional codes without a bias, two states a table: many small kernels and no leaves."""
    d, size, kernels = NETWORK.width, codes.third, 112
    passes = rows * 3 * size * 8 * 30 / RATES.memory
    products = 2 * rows * d * size / RATES.fp64 + 4 * rows * d * size / RATES.fp32
    device = passes + products + kernels * RATES.smallest_kernel + rows * d * 34 / RATES.memory
    return max(device, kernels * RATES.host_launch)


def fused_loss(rows: int, codes: Codes, bias: bool, sum_parts: int = 3, gradient_parts: int = 3) -> float:
    """The loss by kernels that never write W; `parts` are products of bf16 for one of float32."""
    second, third = (128 if size > 64 else 64 for size in (codes.second, codes.third))
    sums = sum_parts if bias else min(sum_parts, 2)
    gradients = gradient_parts if bias else min(gradient_parts, 2)
    box = second * third

    def kernel(blocks: int, first: int, products: int, tile: int, loaded: int, epilogue: int) -> float:
        arithmetic = products * tile * box / RATES.products_a_cycle / 0.85
        loading = loaded * 2 / (RATES.cache / RATES.processors / RATES.clock)
        waves = math.ceil(blocks * first / RATES.processors)
        return waves * (max(arithmetic, loading) + epilogue) / RATES.clock

    blocks = math.ceil(rows / 128)
    seconds = kernel(blocks, codes.first, sums, 128, box * (2 if bias and sum_parts > 1 else 1), 550)
    seconds += kernel(blocks, codes.first, gradients, 128, box * (2 if bias and gradient_parts > 1 else 1), 350)
    if bias:  # operands in one part or in two
        parts = 1 if gradient_parts == 1 else 2
        loaded = 64 * (parts * second + 2 * third)
        seconds += kernel(math.ceil(rows / 64), codes.first, gradient_parts, 64, loaded, 200)
    d, size = NETWORK.width, codes.third
    traffic = rows * (d * 14 + 3 * size * 40) / RATES.memory
    return seconds + 14 * RATES.smallest_kernel + traffic + 4 * rows * d * size / (RATES.bf16 * 0.25)


def plain_loss(rows: int) -> float:
    """The plain decoder's, K = 1: twelve products of bf16 parts, and 17 passes over rows x N numbers."""
    numbers = rows * NETWORK.vocabulary
    return 12 * 2 * numbers * NETWORK.width / (RATES.bf16 * 0.75) + 17 * numbers * 4 / RATES.memory


def peers(rows: int = 20_000) -> dict[str, float]:
    """Exact losses of others at the size of XLM-R, from reading their code."""
    n, d = NETWORK.vocabulary, NETWORK.width
    product = rows * n * d
    chunk = 2 ** math.ceil(math.log2(math.ceil(rows / math.ceil(n / d))))
    table, logits = n * d, chunk * n
    liger_bytes = table * 2 + logits * 8 + table * 2 + logits * 2 + logits * 2 + table * 16
    filtered = (4 * product + rows * 4 * 128 * 128 * d) / 600e12 + rows * 128 * d * 8 / RATES.memory
    return {
        "cut-cross-entropy, exact: 8 R N d operations at 600 TFLOP/s": 8 * product / 600e12,
        "cut-cross-entropy, filtered, one block kept a target": filtered,
        f"liger-kernel, Triton: {math.ceil(rows / chunk)} chunks of {chunk} rows": math.ceil(rows / chunk)
        * liger_bytes
        / RATES.memory,
    }


def step(how: str, sequences: int, loss: Callable[[int], float], gap: float, hooks: float, end: float) -> float:
    """A whole optimizer step of 131,072 tokens.

    Args:
        how: a key of ENCODERS.
        sequences: of a micro-batch.
        loss: seconds of the loss for a number of rows.
        gap: seconds that the device is idle in a micro-batch because the host waits.
        hooks: seconds of the engine's hooks in a micro-batch.
        end: seconds of the optimizer and of what the host reads, once a step.
    """
    tokens = sequences * NETWORK.length
    rows = round(tokens * NETWORK.masked)
    micro = sum(encoder(tokens, how).values()) + head(rows) + loss(rows) + gap + hooks
    return NETWORK.step_tokens / tokens * micro + end


def rows_of_table() -> list[dict[str, float | str]]:
    """Return all that is derived: name, milliseconds, and for whole steps tokens a second."""
    table: list[dict[str, float | str]] = []

    def add(name: str, seconds: float, tokens: int = 0) -> None:
        table.append({"what": name, "milliseconds": round(1e3 * seconds, 2)})
        if tokens:
            table[-1]["million_tokens_per_second"] = round(tokens / seconds / 1e6, 2)

    for how in ENCODERS:
        add(f"encoder, {how}, 131,072 tokens", sum(encoder(131_072, how).values()), 131_072)
    for rows in (4_915, 20_000):
        add(f"head, {rows:,} rows", head(rows))
        add(f"loss, {rows:,} rows, plain", plain_loss(rows))
        add(f"loss, {rows:,} rows, positional, torch form", merged_loss(rows))
        add(f"loss, {rows:,} rows, positional + bias, torch form", torch_loss(rows, POSITIONAL, True))
        add(f"loss, {rows:,} rows, clustered, torch form", torch_loss(rows, CLUSTERED, False))
        add(f"loss, {rows:,} rows, clustered + bias, torch form", torch_loss(rows, CLUSTERED, True))
        add(f"loss, {rows:,} rows, positional + bias, fused", fused_loss(rows, POSITIONAL, True))
        add(f"loss, {rows:,} rows, clustered, fused", fused_loss(rows, CLUSTERED, False))
        add(f"loss, {rows:,} rows, clustered + bias, fused", fused_loss(rows, CLUSTERED, True))
    for name, seconds in peers().items():
        add(f"20,000 rows, {name}", seconds)

    def in_torch(rows: int) -> float:
        return torch_loss(rows, CLUSTERED, True)

    def fused(rows: int) -> float:
        return fused_loss(rows, CLUSTERED, True)

    ms = MILLISECOND
    search = 90 * ms  # 0.9 s for one micro-batch, every ten steps
    for name, seconds in {
        "torch form, eager, micro-batch 64": step("eager", 64, in_torch, 0.8 * ms, 0.35 * ms, 3 * ms),
        "  with masked accuracy by a search of ids": step("eager", 64, in_torch, 0.8 * ms, 0.35 * ms, 3 * ms + search),
        "  with the encoder compiled": step("compiled", 64, in_torch, 0.8 * ms, 0.35 * ms, 3 * ms),
        "  and one micro-batch of 256": step("compiled", 256, in_torch, 0.8 * ms, 0.35 * ms, 3 * ms),
        "  and the fused loss": step("compiled", 256, fused, 0.8 * ms, 0.35 * ms, 3 * ms),
        "  and no waits, a pinned feed": step("compiled", 256, fused, 0.1 * ms, 0.35 * ms, 1.2 * ms),
        "  and no hooks": step("compiled", 256, fused, 0.1 * ms, 0.1 * ms, 0.6 * ms),
        "  and no dropout, FlashAttention 3, fused elementwise": step(
            "fused", 256, fused, 0.1 * ms, 0.1 * ms, 0.6 * ms
        ),
    }.items():
        add(f"step, {name}", seconds, NETWORK.step_tokens)
    return table


@dataclass
class Options:
    json: Path | None = None
    """Write the table here too."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = rows_of_table()
    shown = [
        [f"{row['what']}", f"{row['milliseconds']:,.2f}", f"{row.get('million_tokens_per_second', '')}"]
        for row in table
    ]
    measuring.print_table("Derived for an H100, not measured", ["what", "ms", "M tokens/s"], shown)
    if options.json is not None:
        content = {"derived": True, "device": "H100 SXM", "rates": vars(RATES), "network": vars(NETWORK), "rows": table}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
