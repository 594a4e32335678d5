"""The exact factorised loss against the dense decoder, at the size of XLM-R: time, memory, error.

    python benchmarks/loss.py [--json benchmarks/results/loss.json]        about 5 minutes on one core
    python benchmarks/loss.py --device cuda --positions 20000              on a GPU

512 positions, N = 250,002, d = 512, float32, forward and backward, one thread on both sides. The
references are the dense tied decoder with F.cross_entropy and torch's F.linear_cross_entropy at its
best chunk (torch 2.13 has it; an older one goes without). Errors are taken against dense float64.

On a GPU the dense decoder takes at most 4,096 rows (20,000 would need 80 GB); its time and memory are scaled to all
rows, and its line says so. The bounds of speed and memory are those of a CPU and are not applied there.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from ksub_ds import CodeTable, SubEmbedding, factorized_cross_entropy, plain_codes, positional_codes

N, D = 250_002, 512
CHUNKS = (32, 64, 128, 256, 512)
HAS_LINEAR_CROSS_ENTROPY = hasattr(F, "linear_cross_entropy")
DEDICATED = 8192  # F, tokens with a row of their own
MOST_OF_PARTS = 1.3  # the loss with them, over the factorised one without and a dense one over as many tokens
DENSE_ROWS_ON_GPU = 4096  # 13 GB of logits, their softmax and their gradient


@dataclass
class Options:
    positions: int = 512
    """Rows of the decoder input."""
    tokens: int = N
    """N, the size of the vocabulary."""
    repeats: int = 3
    """Interleaved rounds; the best counts."""
    device: str = "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """Write the numbers here too."""
    memory_of: str | None = None
    """(internal) Measure the peak memory of one variant in this process."""


def leaf_codes(num_tokens: int = N, leaves: tuple[int, int] = (128, 128), rows: int = 128, seed: int = 0) -> CodeTable:
    """Make codes of the shape of balanced clustered ones: equal leaves, distinct random last codes, tokens shuffled."""
    generator = np.random.default_rng(seed)
    count = leaves[0] * leaves[1]
    leaf, place = np.arange(num_tokens) % count, np.arange(num_tokens) // count
    last = np.argsort(generator.random((count, rows)), axis=1)[leaf, place]
    codes = np.stack([leaf // leaves[1], leaf % leaves[1], last], axis=1)
    return CodeTable(codes[generator.permutation(num_tokens)], (*leaves, rows))


def positional(num_tokens: int) -> CodeTable:
    return positional_codes(num_tokens, 3)


def clustered(num_tokens: int) -> CodeTable:
    """Make codes with leaves of XLM-R's shape (128 x 128 of 128 rows at N = 250,002), an eighth of them in use."""
    size = 2 * round((8 * num_tokens) ** (1 / 3) / 2 + 1)
    return leaf_codes(num_tokens, (size, size), size)


# How the codes are made, whether there is a bias per token, and the least speed over the dense decoder's at N tokens.
OURS: dict[str, tuple[Callable[[int], CodeTable], bool, float]] = {
    "positional": (positional, False, 1500),
    "positional + bias": (positional, True, 250),
    "128 x 128 leaves": (clustered, False, 75),
    "128 x 128 leaves + bias": (clustered, True, 45),
}
PLAIN = {"plain (K = 1)": (plain_codes, False, 0.0)}  # a row a token, by this project's loss; not in the table here


def rows_of(name: str, options: Options) -> int:
    """Return how many rows a variant takes: all, but the dense decoder on a GPU no more than fit any."""
    dense_on_gpu = name.startswith("dense") and options.device != "cpu"
    return min(options.positions, DENSE_ROWS_ON_GPU) if dense_on_gpu else options.positions


def problem(rows: int, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).to(options.device).requires_grad_()
    return hidden, torch.randint(options.tokens, (rows,), generator=generator).to(options.device)


def step_of(name: str, options: Options, waits: bool = True) -> Callable[[], None]:
    """Return a function that does one forward and backward of a variant, with gradients cleared first.

    Args:
        name: of the variant.
        options: its sizes and device.
        waits: for the device, at the end of each call.
    """
    hidden, labels = problem(rows_of(name, options), options)
    if name in OURS | PLAIN:
        make, with_bias, _ = (OURS | PLAIN)[name]
        layer = SubEmbedding(make(options.tokens), D).to(options.device)
        bias = torch.zeros(options.tokens, device=options.device, requires_grad=True) if with_bias else None
        leaves = [hidden, *layer.parameters(), *([bias] if bias is not None else [])]

        def loss() -> torch.Tensor:
            return factorized_cross_entropy(hidden, layer, labels, bias)
    else:
        weight = (0.02 * torch.randn(options.tokens, D, device=options.device)).requires_grad_()
        bias = (
            torch.zeros(options.tokens, device=options.device, requires_grad=True) if name.endswith("+ bias") else None
        )
        leaves = [hidden, weight, *([bias] if bias is not None else [])]

        def loss() -> torch.Tensor:
            if name.startswith("dense"):
                return F.cross_entropy(F.linear(hidden, weight, bias), labels)
            chunk = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(name.split()[-1]))
            return F.linear_cross_entropy(hidden, weight, labels, options=chunk)

    return step_through(loss, leaves, options.device if waits else "cpu")


def step_through(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor], device: str) -> Callable[[], None]:
    """Return a function that clears gradients, goes forward and backward, and waits for the device, if it is a GPU."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure_dedicated(options: Options) -> dict[str, float]:
    """Time the loss with F dedicated tokens, and the two losses that it is made of; milliseconds, and their ratio."""
    table, count = clustered(options.tokens), min(DEDICATED, options.tokens // 4)
    chosen = np.sort(np.random.default_rng(0).choice(options.tokens, count, replace=False))
    rest = np.delete(table.codes, chosen, axis=0)
    hidden, labels = problem(options.positions, options)

    def factorised(codes: CodeTable) -> Callable[[], None]:
        layer = SubEmbedding(codes, D).to(options.device)
        bias = torch.zeros(codes.num_tokens, device=options.device, requires_grad=True)
        targets = labels % codes.num_tokens
        leaves = [hidden, bias, *layer.parameters()]
        return step_through(lambda: factorized_cross_entropy(hidden, layer, targets, bias), leaves, options.device)

    weight = (0.02 * torch.randn(count, D, device=options.device)).requires_grad_()
    offsets = torch.zeros(count, device=options.device, requires_grad=True)
    steps = {
        "dedicated": factorised(CodeTable(table.codes, table.table_sizes, dedicated=chosen)),
        "without": factorised(CodeTable(rest, table.table_sizes)),
        "dense": step_through(
            lambda: F.cross_entropy(F.linear(hidden, weight, offsets), labels % count),
            [hidden, weight, offsets],
            options.device,
        ),
    }
    milliseconds = {name: 1e3 * each for name, each in measuring.interleaved(steps, options.repeats).items()}
    ratio = milliseconds["dedicated"] / (milliseconds["without"] + milliseconds["dense"])
    return {"tokens": count, **milliseconds, "ratio": ratio}


def peak_of(name: str, options: Options) -> int:
    step = step_of(name, options)
    if options.device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if name in OURS:  # the lazily built index is the model's, not the call's
        step()
    return measuring.peak_memory(step)


def measure_time_and_memory(options: Options) -> list[dict]:
    rows_taken = {name: rows_of(name, options) for name in ("dense", "dense + bias", *OURS)}
    best_chunk = None
    if HAS_LINEAR_CROSS_ENTROPY:
        torch_chunks = [f"linear_cross_entropy chunk {chunk}" for chunk in CHUNKS if chunk <= options.positions]
        trial = measuring.interleaved({name: step_of(name, options) for name in torch_chunks}, repeats=1)
        best_chunk = min(trial, key=trial.__getitem__)
        rows_taken[best_chunk] = options.positions
    else:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: left out", file=sys.stderr)
    names = ["dense", "dense + bias", *([best_chunk] if best_chunk else []), *OURS]
    scale = {name: options.positions / rows_taken[name] for name in names}
    seconds = measuring.interleaved({name: step_of(name, options) for name in names}, options.repeats)
    seconds = {name: seconds[name] * scale[name] for name in names}
    arguments = ["--positions", str(options.positions), "--device", options.device, "--tokens", str(options.tokens)]
    memory = {name: measuring.in_fresh_process(__file__, "--memory-of", name, *arguments) for name in names}
    memory = {name: memory[name] * scale[name] for name in names}
    dense, rows = seconds["dense"], []
    for name in names:
        bound = OURS[name][2] if name in OURS and options.tokens == N and options.device == "cpu" else None
        rows.append({
            "variant": name if scale[name] == 1 else f"{name} ({rows_taken[name]:,} rows, scaled)",
            "milliseconds": seconds[name] * 1e3,
            "times_faster_than_dense": dense / seconds[name],
            "times_faster_than_linear_cross_entropy": seconds[best_chunk] / seconds[name] if best_chunk else None,
            "extra_megabytes": memory[name] / 1e6,
            "extra_memory_of_dense": memory[name] / memory["dense"],
            "bound": bound,
        })  # fmt: skip
    return rows


def random_case(
    table: CodeTable, rows: int, dim: int, with_bias: bool, scale: float, gap: float, zipf: bool
) -> tuple[SubEmbedding, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return a layer, the states of some rows, a bias and labels.

    The bias is normal or, as log frequencies are, the logarithm of one over a random rank.
    """
    generator = torch.Generator().manual_seed(1)
    layer = SubEmbedding(table, dim)
    for weights in layer.parameters():
        weights.data = torch.randn(weights.shape, generator=generator) / dim**0.5
    hidden = torch.randn(rows, dim, generator=generator) * scale
    if gap:  # one row of each table has by far the largest score, and no token has all of them
        for weights in layer.parameters():
            weights.data[-1] = 1.0
        hidden = hidden * 0.1 + gap / (dim // table.num_tables * (table.num_tables - 1))
    bias = torch.randn(table.num_tokens, generator=generator) if with_bias else None
    if zipf:
        bias = -torch.log(torch.randperm(table.num_tokens, generator=generator) + 1.0)
    labels = torch.randint(table.num_tokens, (rows,), generator=generator)
    return layer, hidden, bias, labels


def measure_error(
    table: CodeTable,
    rows: int,
    dim: int,
    with_bias: bool,
    scale: float,
    gap: float = 0.0,
    *,
    zipf: bool = False,
    device: str = "cpu",
) -> dict:
    """Measure loss and gradient error of ours and of dense float32 against dense float64, of a `random_case`."""
    layer, hidden, bias, labels = random_case(table, rows, dim, with_bias, scale, gap, zipf)
    labels = labels.to(device)
    own = [] if layer.dedicated_rows is None else [layer.dedicated_rows]
    inputs = [hidden, *(weights.detach() for weights in [*layer.tables, *own]), *([bias] if with_bias else [])]
    layer, inputs = layer.to(device), [tensor.to(device) for tensor in inputs]

    def solve(dtype: torch.dtype, factorised: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], float]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        tables, largest = leaves[1 : 1 + table.num_tables], 0.0
        if factorised:
            layer.tables = torch.nn.ParameterList(tables)
            parameters = list(layer.tables)
            if own:
                layer.dedicated_rows = torch.nn.Parameter(leaves[1 + table.num_tables])
                parameters.append(layer.dedicated_rows)
            loss = factorized_cross_entropy(leaves[0], layer, labels, leaves[-1] if with_bias else None)
            leaves = [leaves[0], *parameters, *leaves[1 + len(parameters) :]]
        else:
            weight = torch.cat([part[layer.codes[:, k].long()] for k, part in enumerate(tables)], dim=1)
            if own:
                weight = weight.index_add(0, layer.dedicated, leaves[1 + table.num_tables])
            logits = F.linear(leaves[0], weight, leaves[-1] if with_bias else None)
            largest = logits.abs().max().item()
            loss = F.cross_entropy(logits, labels)
        return loss.detach().double(), torch.autograd.grad(loss, leaves), largest

    exact, exact_gradients, largest = solve(torch.float64, False)
    ours, our_gradients, _ = solve(torch.float32, True)
    naive, naive_gradients, _ = solve(torch.float32, False)

    def worst(gradients: tuple[torch.Tensor, ...]) -> float:
        norms = [e.norm().item() for e in exact_gradients]
        least = 1e-3 * max(norms)  # a table of which all tokens use one row has no gradient but rounding
        triples = zip(gradients, exact_gradients, norms, strict=True)
        return max((g.double() - e).norm().item() / max(norm, least) for g, e, norm in triples)

    scale_of_loss = max(1.0, abs(exact.item()))
    result = {
        "loss": exact.item(), "largest_logit": largest,
        "loss_error": abs((ours - exact).item()) / scale_of_loss,
        "dense_loss_error": abs((naive - exact).item()) / scale_of_loss,
        "gradient_error": worst(our_gradients), "dense_gradient_error": worst(naive_gradients),
    }  # fmt: skip
    limit = 1e-4 if largest > 1e3 else 5e-6
    result["gradient_bound"] = max(limit, 3 * result["dense_gradient_error"])
    result["ok"] = result["loss_error"] <= 5e-6 and result["gradient_error"] <= result["gradient_bound"]
    return result


def error_cases(device: str = "cpu", tokens: int = N, dim: int = D) -> dict[str, Callable[[], dict]]:
    """List the cases: full size, then the difficult ones at a smaller size."""
    error = functools.partial(measure_error, device=device)

    def without_a_common_maximum(size: int = 21) -> CodeTable:
        codes = np.stack(np.unravel_index(np.arange(size**3), (size,) * 3), axis=1)
        return CodeTable(codes[(codes == size - 1).sum(axis=1) < 3], (size,) * 3)

    cases: dict[str, Callable[[], dict]] = {}
    for name, (make, with_bias, _) in OURS.items():
        cases[f"full size, {name}"] = lambda make=make, with_bias=with_bias: error(
            make(tokens), 64, dim, with_bias, 1.0
        )
    for k in range(1, 9):
        cases[f"K = {k}"] = lambda k=k: error(positional_codes(8000, k), 64, 96, True, 3.0)
    for scale in (300.0, 3000.0):
        cases[f"K = 3, scale {scale:g}"] = lambda s=scale: error(positional_codes(8000, 3), 64, 96, True, s)
    cases["K = 1, scale 3000"] = lambda: error(plain_codes(8000), 64, 96, True, 3000.0)
    for gap in (60, 80, 100, 104, 120):
        cases[f"maxima that meet in no token, gap {gap}"] = lambda gap=gap: error(
            without_a_common_maximum(), 64, 96, True, 1.0, gap
        )
    for count in (1, 800, 7999, 8000):
        cases[f"K = 3, {count:,} dedicated"] = lambda count=count: error(
            CodeTable(positional_codes(8000, 3).codes, (20, 20, 20), dedicated=range(count)), 64, 96, True, 3.0
        )
    cases["N = M^K"] = lambda: error(positional_codes(20**3, 3), 64, 96, False, 3.0)
    cases["N = M^K - 1"] = lambda: error(positional_codes(20**3 - 1, 3), 64, 96, False, 3.0)
    cases["one row"] = lambda: error(positional_codes(8000, 3), 1, 96, True, 3.0)
    return cases


def all_rows_ignored(device: str = "cpu") -> bool:
    layer = SubEmbedding(positional_codes(1000, 3), 96).to(device)
    hidden = torch.randn(8, 96, device=device, requires_grad=True)
    loss = factorized_cross_entropy(hidden, layer, torch.full((8,), -100, device=device), reduction="sum")
    loss.backward()
    return loss.item() == 0.0 and bool((hidden.grad == 0).all())


def report(timings: list[dict], errors: dict[str, dict]) -> None:
    rows = [
        [
            row["variant"],
            f"{row['milliseconds']:,.1f}",
            f"{row['times_faster_than_dense']:,.1f}",
            f"{row['times_faster_than_linear_cross_entropy']:,.1f}" if HAS_LINEAR_CROSS_ENTROPY else "",
            f"{row['extra_megabytes']:,.1f}",
            measuring.verdict(row["times_faster_than_dense"], row["bound"]) if row["bound"] else "",
            measuring.verdict(row["extra_memory_of_dense"], 1 / 30, at_least=False) if row["bound"] else "",
        ]
        for row in timings
    ]
    header = ["variant", "ms", "x dense", "x linear_cross_entropy", "extra MB", "speed", "memory of dense"]
    measuring.print_table("Forward and backward", header, rows)
    rows = [
        [
            name,
            f"{e['largest_logit']:,.0f}",
            f"{e['loss_error']:.1e}",
            f"{e['dense_loss_error']:.1e}",
            f"{e['gradient_error']:.1e}",
            f"{e['dense_gradient_error']:.1e}",
            "ok" if e["ok"] else "MISSED",
        ]
        for name, e in errors.items()
    ]
    header = ["case", "max |logit|", "loss error", "dense fp32's", "gradient error", "dense fp32's", ""]
    measuring.print_table(
        "Error against dense float64 (loss: of max(1, |loss|); gradient: relative norm)", header, rows
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(peak_of(options.memory_of, options)))
        return
    print(measuring.machine(), file=sys.stderr)
    timings = measure_time_and_memory(options)
    dedicated = measure_dedicated(options)
    errors = {name: case() for name, case in error_cases(options.device).items()}
    report(timings, errors)
    took = "{dedicated:,.1f} ms; without them {without:,.1f}, and a dense loss over as many {dense:,.1f} ms"
    verdict = measuring.verdict(dedicated["ratio"], MOST_OF_PARTS, at_least=False)
    print(f"\n{dedicated['tokens']:,} dedicated tokens, leaves + bias: {took.format(**dedicated)}: {verdict}")
    print(f"\nall rows ignored: {'ok' if all_rows_ignored(options.device) else 'MISSED'}")
    measuring.save(
        options.json, {"positions": options.positions, "timings": timings, "dedicated": dedicated, "errors": errors}
    )


if __name__ == "__main__":
    main()
