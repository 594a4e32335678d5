"""Balanced k-means against k-means-constrained and OR-tools: time, inertia, memory, at the size of XLM-R.

    python benchmarks/clustering.py [--json benchmarks/results/clustering.json]     about 10 minutes on two cores
    python benchmarks/clustering.py --parts assignment kmeans                       the first two tables only

Vectors are made here: an anisotropic mixture of 1,000 components of Zipf weights, D = 768.

    assignment   one balanced assignment of 20,000 vectors to 128 centroids, one thread, against
                 OR-tools' min-cost flow on the same costs
    kmeans       20,000 -> 128 from the same first centroids, one thread, against k-means-constrained
    tree         250,002 -> 128 -> 128 -> distinct codes, all cores, against FAISS's own k-means of the
                 first level alone (25 iterations over all points, sizes free)

k-means-constrained and OR-tools run in an environment of their own (OR-tools would bring an older protobuf than the
project has): --oracle names its folder, where it is made once. Where pip cannot get them, their parts are skipped.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import tyro

from ksub_ds.codes.assignment import balanced_assignment
from ksub_ds.codes.clustering import clustered_codes
from ksub_ds.codes.kmeans import balanced_kmeans, free_kmeans, one_thread

N, D, M = 250_002, 768, 128
SMALL_N = 20_000
ORACLE = "k-means-constrained==0.9.1"  # OR-tools comes with it
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ksub_ds"


@dataclass
class Options:
    parts: tuple[str, ...] = ("assignment", "kmeans", "tree")
    """Which tables to measure."""
    repeats: int = 3
    """Interleaved rounds of the assignment; the best counts."""
    oracle: Path = CACHE / ORACLE
    """Folder of the environment with k-means-constrained and OR-tools; made when it is not there."""
    json: Path | None = None
    """Write the numbers here too."""
    tree_in_this_process: bool = False
    """(internal) Measure the tree and its peak memory in this process."""


def mixture(count: int, width: int = D, components: int = 1000, seed: int = 0) -> np.ndarray:
    """(count, width) float32: components of Zipf weights, axes of falling scale."""
    draw = np.random.default_rng(seed)
    spectrum = ((1 + np.arange(width)) ** -0.5).astype(np.float32)
    means = draw.standard_normal((components, width), dtype=np.float32) * spectrum
    spread = 0.5 * np.exp(0.5 * draw.standard_normal(components, dtype=np.float32))
    weights = 1 / np.arange(1, components + 1)
    chosen = draw.choice(components, count, p=weights / weights.sum())
    vectors = draw.standard_normal((count, width), dtype=np.float32)
    vectors *= spectrum
    vectors *= spread[chosen, None]
    vectors += means[chosen]
    return vectors


class Oracle:
    """k-means-constrained and OR-tools in an environment of their own, called as processes."""

    def __init__(self, folder: Path):
        self.python = folder / "bin" / "python"
        if not self.python.exists():
            print(f"making {folder} for {ORACLE}", file=sys.stderr)
            venv.create(folder, with_pip=True)
        # pip finds in a second that there is nothing to do, and completes what was interrupted
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ORACLE]
        self.is_there = subprocess.run(command, env=self.environment(), check=False).returncode == 0

    @staticmethod
    def environment() -> dict[str, str]:
        """One thread, and no path to the project's packages."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def solve(self, task: str, **arrays: np.ndarray) -> dict[str, Any]:
        """Run a task of clustering_oracle.py; return its results by name."""
        script = Path(__file__).with_name("clustering_oracle.py")
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "input.npz"), Path(folder, "output.npz")
            np.savez(source, **arrays)
            subprocess.run([self.python, script, task, source, target], env=self.environment(), check=True)
            with np.load(target, allow_pickle=False) as found:
                return {name: found[name] if found[name].ndim else found[name].item() for name in found}


def assignment(options: Options, oracle: Oracle) -> dict:
    """Measure one assignment against OR-tools' min-cost flow."""
    import faiss

    vectors = mixture(SMALL_N)
    seconds = {"ours": float("inf"), "OR-tools": float("inf")}
    with one_thread():
        centroids = free_kmeans(vectors, M, seed=0).centroids
        costs = faiss.pairwise_distances(vectors, centroids)
        for _ in range(options.repeats):
            turn = measuring.interleaved({"ours": lambda: balanced_assignment(costs)}, repeats=1)
            peer = oracle.solve("assignment", costs=costs)
            seconds = {
                "ours": min(seconds["ours"], turn["ours"]),
                "OR-tools": min(seconds["OR-tools"], peer["seconds"]),
            }
        labels = {"ours": balanced_assignment(costs)[0], "OR-tools": peer["labels"]}
    cost = {name: float(costs[np.arange(SMALL_N), chosen].sum(dtype=np.float64)) for name, chosen in labels.items()}
    row = {
        "seconds": seconds,
        "cost": cost,
        "times_faster": seconds["OR-tools"] / seconds["ours"],
        "cost_ratio": cost["ours"] / cost["OR-tools"],
    }
    measuring.print_table(
        f"One assignment, {SMALL_N:,} x {M}",
        ["", "s", "cost", "x faster", "cost ratio"],
        [
            ["OR-tools", f"{seconds['OR-tools']:.3f}", f"{cost['OR-tools']:.3f}", "", ""],
            [
                "ours",
                f"{seconds['ours']:.3f}",
                f"{cost['ours']:.3f}",
                f"{row['times_faster']:.1f} " + measuring.verdict(row["times_faster"], 6),
                f"{row['cost_ratio']:.7f} " + measuring.verdict(row["cost_ratio"], 1 + 1e-6, at_least=False),
            ],
        ],
    )
    return row


def kmeans(oracle: Oracle) -> dict:
    """Measure the whole k-means from the same first centroids, on one thread."""
    vectors = mixture(SMALL_N)
    with one_thread():
        start = free_kmeans(vectors, M, seed=0).centroids
        begin = time.perf_counter()
        ours = balanced_kmeans(vectors, M, initial=start)
        seconds = time.perf_counter() - begin
    peer = oracle.solve("kmeans", vectors=vectors, start=start)
    sizes = np.bincount(ours.labels, minlength=M)
    row = {
        "seconds": {"ours": seconds, "k-means-constrained": peer["seconds"]},
        "inertia": {"ours": ours.inertia, "k-means-constrained": peer["inertia"]},
        "times_faster": peer["seconds"] / seconds,
        "inertia_ratio": ours.inertia / peer["inertia"],
        "sizes": [int(sizes.min()), int(sizes.max())],
    }
    measuring.print_table(
        f"Balanced k-means, {SMALL_N:,} x {D} -> {M}, same first centroids, at most 15 iterations",
        ["", "s", "inertia", "x faster", "inertia ratio"],
        [
            ["k-means-constrained", f"{peer['seconds']:.1f}", f"{peer['inertia']:.1f}", "", ""],
            [
                "ours",
                f"{seconds:.1f}",
                f"{ours.inertia:.1f}",
                f"{row['times_faster']:.1f} " + measuring.verdict(row["times_faster"], 5),
                f"{row['inertia_ratio']:.5f} " + measuring.verdict(row["inertia_ratio"], 1.003, at_least=False),
            ],
        ],
    )
    return row


def tree() -> dict:
    """Measure all of Algorithm 2 at XLM-R's size; runs in a fresh process, for its peak memory."""
    import faiss

    vectors = mixture(N)
    with measuring.PeakMemory() as memory:
        begin = time.perf_counter()
        codes = clustered_codes(vectors, 3, M)
        seconds = time.perf_counter() - begin
    codes.verify()
    first = np.bincount(codes.codes[:, 0])
    leaves = np.bincount(codes.codes[:, 0] * M + codes.codes[:, 1])
    begin = time.perf_counter()
    faiss.Kmeans(D, M, niter=25, seed=0, max_points_per_centroid=N).train(vectors)
    free = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "faiss_first_level_seconds": free,
        "times_faiss": seconds / free,
        "peak_gigabytes": memory.peak / 1e9,
        "sizes": [int(first.min()), int(first.max()), int(leaves.min()), int(leaves.max())],
        "cores": len(os.sched_getaffinity(0)),
    }


def report_tree(row: dict) -> None:
    exact = row["sizes"] == [N // M, -(-N // M), N // M**2, -(-N // M**2)]
    measuring.print_table(
        f"Algorithm 2, {N:,} x {D} -> {M} -> {M} -> distinct codes, {row['cores']} cores",
        ["s", "x FAISS's first level", "peak GB (all processes)", "sizes"],
        [
            [
                f"{row['seconds']:.0f} " + measuring.verdict(row["seconds"], 240, at_least=False),
                f"{row['times_faiss']:.1f} " + measuring.verdict(row["times_faiss"], 12, at_least=False),
                f"{row['peak_gigabytes']:.1f} " + measuring.verdict(row["peak_gigabytes"], 6, at_least=False),
                "exact" if exact else f"MISSED {row['sizes']}",
            ]
        ],
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.tree_in_this_process:
        print(json.dumps(tree()))
        return
    print(measuring.machine(), file=sys.stderr)
    parts, result = set(options.parts), {}
    if parts & {"assignment", "kmeans"}:
        oracle = Oracle(options.oracle)
        if not oracle.is_there:
            print(f"assignment and kmeans: skipped, pip cannot install {ORACLE} in {options.oracle} (see above)")
            parts -= {"assignment", "kmeans"}
    if "assignment" in parts:
        result["assignment"] = assignment(options, oracle)
    if "kmeans" in parts:
        result["kmeans"] = kmeans(oracle)
    if "tree" in parts:
        result["tree"] = measuring.in_fresh_process(__file__, "--tree-in-this-process", trims=False)
        report_tree(result["tree"])
    measuring.save(options.json, result)


if __name__ == "__main__":
    main()
