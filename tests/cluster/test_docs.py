"""docs/cluster.md: every command there is run as it is written, and every way to start gives the same losses."""

import re
import shlex
from pathlib import Path

import pytest

from .conftest import BIN, ROOT, Cluster, Done, losses
from .slurm import Slurm

PAGE = ROOT / "docs" / "cluster.md"
BLOCKS = re.findall(r"(?:^    .+\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
LINES = [line[4:] for block in BLOCKS for line in block.splitlines()]
TINY = next(line for line in LINES if line.startswith("tiny="))
HOSTS = [line for line in LINES if re.fullmatch(r"node\d+ slots=\d+", line)]
COMMANDS = [line for line in LINES if line != TINY and line not in HOSTS]
RUNS = {match[1]: line for line in COMMANDS if (match := re.search(r"--out (run-[\w-]+)", line))}
OVER_SSH = [name for name, line in RUNS.items() if "launch/pretrain.sh" in line]


@pytest.fixture(scope="module")
def folder(cluster: Cluster) -> Path:
    """A folder as the page assumes it: hosts, codes, shards, and the project's own folders."""
    for name in ("launch", "ds_configs"):
        (cluster.folder / name).symlink_to(ROOT / name)
    (cluster.folder / "hosts").write_text("\n".join(HOSTS) + "\n")
    return cluster.folder


def run(cluster: Cluster, line: str, host: int = 1) -> Done:
    return cluster.start(host, "bash", "-c", f"{TINY}\n{line}").finish()


@pytest.fixture(scope="module")
def here(cluster: Cluster, folder: Path) -> list[float]:
    """Losses of two ranks on one host by `mpirun -n 2`, the page's line that needs no network."""
    done = run(cluster, RUNS["run-mpi"])
    assert done.code == 0, done.text
    assert "2 ranks (node1 x 2)" in done.text
    return losses(folder / "run-mpi")


@pytest.mark.parametrize("name", OVER_SSH)
def test_over_ssh(cluster: Cluster, folder: Path, here: list[float], name: str) -> None:
    """From node1, which is in the hostfile, or from the head, which is not. Each node's log reaches the run folder."""
    done = run(cluster, RUNS[name], host=OVER_SSH.index(name) % 2)
    assert done.code == 0, done.text
    assert "2 ranks (node1 x 1, node2 x 1)" in done.text and ("ZeRO stage 3" in done.text) == (name == "run-zero3")
    assert losses(folder / name) == pytest.approx(here, rel=1e-5)
    cluster.assert_nothing_left(name)
    for number, host in enumerate(("node1", "node2")):
        lines = (folder / name / "logs" / f"{host}.log").read_text().splitlines()
        assert f"rank {number} started as process" in lines[0]
        assert lines[-1].endswith(f"rank {number} ended: exit code 0")


@pytest.mark.parametrize("mpirun", [BIN / "mpirun", Path("/usr/bin/mpirun")])
def test_mpirun_over_hosts(cluster: Cluster, folder: Path, here: list[float], mpirun: Path) -> None:
    """The environment's Open MPI (5, a wheel) and the system's (4 in Debian 12), where they are."""
    if not mpirun.exists():
        pytest.skip(f"{mpirun} is not installed")
    name = f"run-mpi{mpirun.parent}".replace("/", "-")
    line = RUNS["run-mpi-hosts"].replace("mpirun", str(mpirun), 1).replace("run-mpi-hosts", name)
    done = run(cluster, line)
    assert done.code == 0, done.text
    assert "2 ranks (node1 x 1, node2 x 1)" in done.text
    assert losses(folder / name) == pytest.approx(here, rel=1e-5)


def test_slurm(slurm: Slurm, folder: Path, here: list[float]) -> None:
    done = slurm.run("bash", "-c", f"{TINY}\n{RUNS['run-slurm']}", cwd=folder)
    number = int(done.stdout.split()[-1])
    job, output = slurm.wait(number), folder / f"ksub-pretrain-{number}.log"
    assert job["JobState"] == "COMPLETED", output.read_text()
    assert "2 ranks (node1 x 1, node2 x 1)" in output.read_text()
    assert losses(folder / "run-slurm") == pytest.approx(here, rel=1e-5)
    logs = folder / "run-slurm" / "logs"
    assert (logs / "hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    assert "0: " in (logs / f"slurm-{number}.log").read_text()


def test_dry_runs(cluster: Cluster, folder: Path) -> None:
    lines = [line for line in COMMANDS if line.startswith("ksub submit --dry-run")]
    for line in lines:
        done = run(cluster, line)
        assert done.code == 0 and done.text.startswith("sbatch --"), done.text
        assert shlex.split(line)[-1] == shlex.split(done.text)[-1]
    assert len(lines) == 3


def test_no_command_is_forgotten() -> None:
    """What the tests above, and test_slurm (scancel), do not run."""
    ours = [line for line in COMMANDS if not line.startswith(("ksub submit --dry-run", "scancel "))]
    assert sorted(ours) == sorted(RUNS.values())
    assert {*OVER_SSH, "run-mpi", "run-mpi-hosts", "run-slurm"} == set(RUNS) and len(HOSTS) == 2
