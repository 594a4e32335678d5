"""Three namespace hosts and a head for all cluster tests, and runs on them. `make test-cluster` asks for them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .namespaces import SYSTEM_PATH, Host, Hosts, alone, wait_until, why_not
from .slurm import Slurm
from .slurm import why_not as why_no_slurm

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "launch" / "pretrain.sh"
STEPS = 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on several hosts need root and minutes: they run when asked for."""
    reason = None if os.environ.get("KSUB_CLUSTER") else "several hosts: run `make test-cluster` (KSUB_CLUSTER=1)"
    reason = reason or why_not()
    for item in items:
        if Path(item.path).parent == Path(__file__).parent and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


MEASURED: list[str] = []  # docs/cluster.md's column of this name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the faults of this session took to end."""
    for line in MEASURED:
        terminalreporter.write_line(f"measured: {line}")


class Fault:
    """Something breaks now (or has broken at `start`, as time.time() counts): how long until all is over?"""

    def __init__(self, what: str, start: float | None = None):
        self._what, self._start = what, time.time() if start is None else start

    def over(self, within: float) -> None:
        """All is over: note the seconds, and hold docs/cluster.md's word."""
        seconds = time.time() - self._start
        MEASURED.append(f"{self._what}: {seconds:.1f} s, of {within:.0f}")
        assert seconds <= within, MEASURED[-1]


def environment() -> dict[str, str]:
    """What a user's shell has, and nothing of this process: one thread a rank, no GPU."""
    return {
        "PATH": f"{BIN}:{SYSTEM_PATH}",
        "PYTHONPATH": str(ROOT),
        "HOME": os.environ.get("HOME", "/root"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }


@dataclass
class Done:
    """A command that ended."""

    code: int
    text: str  # stdout and stderr

    def last_line(self) -> str:
        """What the user sees last."""
        return self.text.strip().splitlines()[-1]


class Running:
    """A command that runs on a host, its output in a file."""

    def __init__(self, host: Host, words: list[object], folder: Path, log: Path, env: dict[str, str]):
        self.host, self.log = host, log
        with log.open("w") as stream:
            self.process = host.start(*words, log=stream, cwd=folder, env=env)

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def finish(self, seconds: float = 240.0) -> Done:
        """Wait for its end."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds:.0f} s:\n{self.text()[-6000:]}") from None
        return Done(self.process.returncode, self.text())


class Cluster:
    """The hosts, the data that all runs share, and how a run is started."""

    def __init__(self, hosts: Hosts, folder: Path, data: Path, codes: Path):
        self.hosts, self.folder, self.data, self.codes = hosts, folder, data, codes
        self.count = 0

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def arguments(self, name: str, **settings: Any) -> list[str]:
        """The trainer's command line of the run `name`: relative paths, as users write them."""
        values = {"preset": "tiny", "codes": "codes.safetensors", "data": "shards", "out": name}
        values |= {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "save_every_steps": 4}
        values |= {"eval_every": 0, "log_every_steps": 6, "keep_last": 100, **settings}
        pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in values.items() if value is not None)
        return [part for pair in pairs for part in pair]

    def hostfile(self, *numbers: int, slots: int = 1) -> Path:
        """A hostfile of some nodes."""
        self.count += 1
        return self.hosts.hostfile(self.folder / f"hosts{self.count}", numbers, slots)

    def start(self, host: int, *words: object, env: dict[str, str] | None = None) -> Running:
        """Start a command on a host, in the folder of the runs."""
        self.count += 1
        log = self.folder / f"output{self.count}.log"
        return Running(self.hosts[host], list(words), self.folder, log, environment() | (env or {}))

    def launch(self, hostfile: Path, *words: object, host: int = 1, env: dict[str, str] | None = None) -> Running:
        """Start launch/pretrain.sh on a host."""
        return self.start(host, SCRIPT, "--hostfile", hostfile, *words, env=env)

    def workers(self, host: int, name: str) -> list[int]:
        """The training processes of a run on a host."""
        return self.hosts[host].processes("-m ksub_ds.pretrain", f"--out {name} ")

    def assert_nothing_left(self, name: str) -> None:
        """No process of a run on any host: workers, supervisors, launchers."""

        def left() -> list[Any]:
            kinds = (("ksub_ds.pretrain", f"--out {name} "), ("ksub_ds.cluster.supervisor",), ("deepspeed",), ("pdsh",))
            return [
                (h.name, kind, h.processes(*kind)) for h in self.hosts.hosts for kind in kinds if h.processes(*kind)
            ]

        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not left(), "", 30)
        assert not left()

    def wait_for_step(self, run: Running, name: str, step: int, seconds: float = 240.0) -> None:
        """Until a run has trained a step; fails at once when the run ends before."""

        def trained() -> bool:
            if run.process.poll() is not None:
                raise AssertionError(f"ended before step {step}:\n{run.text()[-6000:]}")
            return steps_done(self.folder / name) >= step

        wait_until(trained, f"step {step} of {name}", seconds)


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    found = 0
    for line in lines:
        with contextlib.suppress(ValueError):  # half written
            found = json.loads(line)["step"]
    return found


def losses(run: Path) -> list[float]:
    """The loss of every step, which must be 1, 2, 3, ..."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(run: Path, step: int = STEPS) -> dict[str, Any]:
    """The weights of a checkpoint."""
    from safetensors.numpy import load_file

    return load_file(run / "checkpoints" / f"global_step{step}" / "model.safetensors")


@pytest.fixture(scope="session")
def cluster(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The hosts; no other set of hosts is up on this machine at the same time."""
    from ksub_ds import positional_codes
    from ksub_ds.corpus.shards.dataset import ShardDataset

    folder = tmp_path_factory.mktemp("cluster")
    (folder / "shards").symlink_to(tiny_shards)
    positional_codes(ShardDataset.open(tiny_shards).manifest["tokenizer"]["vocab_size"], 3).save(
        folder / "codes.safetensors"
    )
    keys = tmp_path_factory.mktemp("keys")
    with alone(), Hosts(keys, 3) as hosts:
        yield Cluster(hosts, folder, tiny_shards, folder / "codes.safetensors")


@pytest.fixture(scope="session")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    """SLURM over the hosts."""
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    return Slurm(cluster.hosts, tmp_path_factory.mktemp("slurm"), environment())


@pytest.fixture(scope="session")
def reference(cluster: Cluster) -> list[float]:
    """Losses of one host with two ranks, started without a launcher over the network."""
    hostfile = cluster.folder / "hosts-local"
    hostfile.write_text("localhost slots=2\n")
    done = cluster.launch(hostfile, *cluster.arguments("reference")).finish()
    assert done.code == 0, done.text
    return losses(cluster.folder / "reference")
