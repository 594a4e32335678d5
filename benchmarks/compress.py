"""`ksub compress` on an embedding of XLM-R's size: time and peak memory of the whole command, on all cores.

    python benchmarks/compress.py [--json benchmarks/results/compress.json]     about 3 minutes on two cores

The model has one layer below 250,002 x 768 vectors made here (as benchmarks/clustering.py makes them), with a masked
language model's head or without. The command reads it, compresses it, and writes, loads and compares the new folder.

    input-only   --input-only --target-ratio 30: product quantisation
    decoder      --num-tables 3 --table-size 128: distinct codes by clustering, tables by least squares
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import clustering
import measuring
import psutil
import tyro

PARTS = {
    "input-only": ("--input-only", "--target-ratio", "30"),
    "decoder": ("--num-tables", "3", "--table-size", "128"),
}
MOST_SECONDS, MOST_GIGABYTES = 120, 4  # on two cores


@dataclass
class Options:
    parts: tuple[str, ...] = tuple(PARTS)
    """Which forms to measure."""
    num_tokens: int = clustering.N
    """N, of the embedding."""
    width: int = clustering.D
    """d, of the embedding."""
    json: Path | None = None
    """Write the numbers here too."""
    in_this_process: Path | None = None
    """(internal) Compress this folder in this process, as the one part."""


def write_model(folder: Path, options: Options, has_decoder: bool) -> None:
    """Write a RoBERTa of one layer over a mixture of vectors."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

    config = RobertaConfig(
        vocab_size=options.num_tokens,
        hidden_size=options.width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=options.width,
    )
    model = RobertaForMaskedLM(config) if has_decoder else RobertaModel(config)
    vectors = torch.from_numpy(clustering.mixture(options.num_tokens, options.width))
    model.get_input_embeddings().weight = torch.nn.Parameter(vectors)
    model.tie_weights()
    model.save_pretrained(folder)


def compress(model: Path, part: str) -> dict:
    """Run the command in this process; the processor's time is its own and its workers'."""
    from ksub_ds.cli import main as ksub

    out = model.with_name(f"{model.name}-small")
    with measuring.PeakMemory() as memory:
        begin = time.perf_counter()
        code = ksub(["compress", str(model), *PARTS[part], "--out", str(out)])
        seconds = time.perf_counter() - begin
    if code:
        sys.exit(code)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    workers = [each.cpu_times() for each in psutil.Process().children(recursive=True)]  # they wait for more to do
    report = json.loads((out / "compression.json").read_text())
    return {
        "processor_seconds": sum(each.ru_utime + each.ru_stime for each in used)
        + sum(each.user + each.system for each in workers),
        "wall_seconds": seconds,
        "peak_gigabytes": max(memory.peak, 1024 * used[0].ru_maxrss) / 1e9,
        "error": report["error"],
        "tables": len(report["table_sizes"]),
        "table_size": report["table_sizes"][0],
    }


def report(rows: dict[str, dict], options: Options) -> None:
    """Print the table; only the full size has bounds."""
    full = (options.num_tokens, options.width) == (clustering.N, clustering.D)

    def judged(value: float, bound: float, digits: int) -> str:
        return f"{value:.{digits}f}" + (f" {measuring.verdict(value, bound, at_least=False)}" if full else "")

    measuring.print_table(
        f"ksub compress, {options.num_tokens:,} x {options.width}",
        ["", "processor s", "wall s", "peak GB", "tables", "error"],
        [
            [
                part,
                f"{row['processor_seconds']:.0f}",
                judged(row["wall_seconds"], MOST_SECONDS, 0),
                judged(row["peak_gigabytes"], MOST_GIGABYTES, 2),
                f"{row['tables']} x {row['table_size']}",
                f"{row['error']:.3f}",
            ]
            for part, row in rows.items()
        ],
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.in_this_process:
        print(json.dumps(compress(options.in_this_process, options.parts[0])))
        return
    print(measuring.machine(), file=sys.stderr)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            model = Path(folder, part)
            write_model(model, options, has_decoder=part == "decoder")
            rows[part] = measuring.in_fresh_process(
                __file__, "--parts", part, "--in-this-process", str(model), trims=False
            )
    report(rows, options)
    measuring.save(options.json, {"num_tokens": options.num_tokens, "width": options.width} | rows)


if __name__ == "__main__":
    main()
