"""Bytes on the wire and time of a step over two hosts, plain against sub-embedding, ZeRO stage by stage.

    sudo python benchmarks/scaling.py [--json benchmarks/results/scaling.json]        about 12 minutes on two cores

The hosts are network namespaces joined by a virtual cable; `tc tbf` limits it. Each host has one rank. XLM-R-MEDIUM:
plain embedding (154M parameters) and positional codes (K = 3, 26M). Micro-batches of 1 x 64 tokens, so that the
messages and not this machine's processor are what is measured. Bytes are what a rank sends in one step, by the
interface's own counter. Needs root, and `ip` and `tc` (Debian: iproute2).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.distributed as dist
import tyro
from engine import N, Zero, batches

from ksub_ds import KSubRobertaConfig, KSubRobertaForMaskedLM, positional_codes
from ksub_ds.codes.positional import plain_codes
from ksub_ds.common import distributed

SPACES = ("ksub-scaling-0", "ksub-scaling-1")
CABLE = ("ksubs0", "ksubs1")
ADDRESS = "10.79.0.{}"


@dataclass
class Options:
    stages: tuple[str, ...] = ("zero0", "zero1", "zero2", "zero3")
    """Files in ds_configs/."""
    rates: tuple[str, ...] = ("1gbit", "100mbit")
    """Speeds of the cable, as `tc` writes them."""
    length: int = 64
    """Tokens of a rank's micro-batch."""
    steps: int = 1
    """Steps timed at every speed; the best counts."""
    json: Path | None = None
    """Write the numbers here too."""
    one: tuple[str, str] | None = None
    """(internal) measure one model at one stage, as a rank."""


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces and the cable between them."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        sys.exit("error: needs root, and ip and tc (Debian: apt install iproute2)")

    def run(command: str, check: bool = True) -> None:
        subprocess.run(command.split(), check=check, stderr=None if check else subprocess.DEVNULL)

    def remove() -> None:
        for space in SPACES:
            run(f"ip netns del {space}", check=False)
        run(f"ip link del {CABLE[0]}", check=False)

    remove()
    try:
        run(f"ip link add {CABLE[0]} type veth peer name {CABLE[1]}")
        for index, space in enumerate(SPACES):
            run(f"ip netns add {space}")
            run(f"ip link set {CABLE[index]} netns {space}")
            run(f"ip -n {space} addr add {ADDRESS.format(index + 1)}/24 dev {CABLE[index]}")
            run(f"ip -n {space} link set {CABLE[index]} up")
            run(f"ip -n {space} link set lo up")
        yield
    finally:
        remove()


def sent_bytes() -> int:
    """What this host has sent over the cable."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() in CABLE:
            return int(numbers.split()[8])
    raise RuntimeError("the cable is not here: this runs in a namespace of `two_hosts`")


def limit(rate: str) -> None:
    """Slow this end of the cable down; "" takes the limit off, which the run before has left."""
    cable = CABLE[distributed.rank()]
    subprocess.run(["tc", "qdisc", "del", "dev", cable, "root"], stderr=subprocess.DEVNULL)
    if not rate:
        return
    shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", cable, "root", *shape], check=True)


def measure(options: Options) -> dict[str, Any]:
    """One model at one stage: bytes of a step, and its seconds at every speed."""
    name, stage = options.one or ("", "")
    distributed.init_distributed()
    limit("")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = plain_codes(N) if name == "plain" else positional_codes(N, 3)
    model = KSubRobertaForMaskedLM(KSubRobertaConfig.xlmr_medium(), table).train()
    trainer, parts = Zero(model, stage, 1, 1), batches(options.length, 1, 1)
    for _ in range(2):  # the first steps allocate, and ZeRO 3 learns its order
        trainer.step(parts)
    result: dict[str, Any] = {"model": name, "stage": stage, "seconds": {}}
    for rate in ("", *options.rates):
        limit(rate)
        best = float("inf")
        for _ in range(options.steps):
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            trainer.step(parts)
            dist.barrier()
            best = min(best, time.perf_counter() - start)
            result["megabytes"] = (sent_bytes() - before) / 1e6
        result["seconds"][rate or "unlimited"] = best
    return result


def in_two_hosts(name: str, stage: str, options: Options) -> dict[str, Any]:
    """Start one rank in each namespace and return what rank 0 measured."""
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": "29555"}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    ranks = []
    for rank, space in enumerate(SPACES):
        command = ["ip", "netns", "exec", space, sys.executable, __file__, "--one", name, stage]
        command += ["--rates", *options.rates, "--length", str(options.length), "--steps", str(options.steps)]
        environment = common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": CABLE[rank]}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    output = ranks[0].communicate()[0]
    ranks[1].communicate()
    if any(rank.returncode for rank in ranks):
        sys.exit(f"error: {name} at {stage} failed")
    return json.loads(output.splitlines()[-1])


def report(options: Options, rows: list[dict[str, Any]]) -> None:
    shown = []
    for stage in options.stages:
        plain, sub = (next(row for row in rows if (row["model"], row["stage"]) == (m, stage)) for m in ("plain", "sub"))
        line = [stage, f"{plain['megabytes']:,.0f}", f"{sub['megabytes']:,.0f}"]
        line.append(f"{plain['megabytes'] / sub['megabytes']:.2f} ")
        line[-1] += measuring.verdict(plain["megabytes"] / sub["megabytes"], 5.5)
        for rate in options.rates:
            ratio = plain["seconds"][rate] / sub["seconds"][rate]
            bound = measuring.verdict(ratio, 3.0) if rate == "100mbit" else ""
            line += [f"{plain['seconds'][rate]:.1f}", f"{sub['seconds'][rate]:.1f}", f"{ratio:.1f} {bound}"]
        shown.append(line)
    header = ["stage", "plain MB", "sub MB", "fewer"]
    for rate in options.rates:
        header += [f"plain s, {rate}", f"sub s, {rate}", "faster"]
    measuring.print_table("A rank's bytes and seconds of one step, 2 hosts", header, shown)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.one:
        result = measure(options)
        if distributed.is_main():
            print(json.dumps(result))
        distributed.shutdown()
        return
    rows = []
    with two_hosts():
        for stage in options.stages:
            for name in ("sub", "plain"):
                rows.append(in_two_hosts(name, stage, options))
                print(rows[-1], file=sys.stderr, flush=True)
    report(options, rows)
    measuring.save(options.json, {"length": options.length, "rows": rows})


if __name__ == "__main__":
    main()
