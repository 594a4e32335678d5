"""Before anything starts: what is wrong, host by host, and nothing is started."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import BIN, ROOT, Cluster
from .namespaces import wait_until


@pytest.fixture
def mounts(cluster: Cluster, tmp_path: Path) -> Iterator[list[tuple[int, Path]]]:
    """What a test has mounted on a host: (host, path); undone at its end."""
    made: list[tuple[int, Path]] = []
    yield made
    for host, path in made:
        cluster[host].unmount(path)


def refused(cluster: Cluster, name: str, *words: object) -> list[str]:
    """The lines of a launch on three hosts that must not start."""
    done = cluster.launch(cluster.hostfile(1, 2, 3), *words, *cluster.arguments(name), host=0).finish()
    assert done.code == 2 and "Traceback" not in done.text, done.text
    lines = done.text.strip().splitlines()
    assert re.fullmatch(r"error: [123] of 3 hosts not ready; nothing was started", lines[-1]), done.text
    assert not (cluster.folder / name / "recipe.json").exists()
    return lines[:-1]


def test_all_that_is_wrong_in_one_round(cluster: Cluster, mounts: list[tuple[int, Path]], tmp_path: Path) -> None:
    """node2 has other codes, a missing shard and another source; node3 is cut off."""
    (cluster.folder / "unready").mkdir()
    damaged = tmp_path / "codes"
    damaged.write_bytes(b"no codes at all")
    source = ROOT / "ksub_ds" / "__init__.py"
    changed = tmp_path / "changed.py"
    changed.write_text(source.read_text() + "\n# changed\n")
    for path, replacement in ((cluster.codes, damaged), (source, changed)):
        cluster[2].mount("--bind", replacement, path)
        mounts.append((2, path))
    for path in (cluster.data / "el", cluster.folder / "unready"):
        cluster[2].mount("-t", "tmpfs", "-o", "ro", "tmpfs", path)
        mounts.append((2, path))
    cluster[3].cut()
    try:
        lines = refused(cluster, "unready")
    finally:
        cluster[3].join()
        wait_until(cluster[3].answers, "node3")
    wanted = (
        r"error: node3: cannot be reached: ssh: connect to host node3 port 22: .*",
        r"error: node2: --codes: codes.safetensors: .*",
        r"error: node2: --data: shards/el/.*: this shard is missing.*",
        r"error: node2: --out unready: cannot be written \(Read-only file system\)",
        r"error: node2: ksub_ds is source \w+, here source \w+; install the same on all hosts",
    )
    for pattern in wanted:
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)
    assert not [line for line in lines if "node1" in line.split()[1]]


def test_other_codes_and_a_full_disk(cluster: Cluster, mounts: list[tuple[int, Path]], tmp_path: Path) -> None:
    from ksub_ds import positional_codes
    from ksub_ds.codes.table import CodeTable

    positional_codes(CodeTable.load(cluster.codes).num_tokens, 2).save(tmp_path / "other.safetensors")
    cluster[3].mount("--bind", tmp_path / "other.safetensors", cluster.codes)
    mounts.append((3, cluster.codes))
    full = cluster.folder / "full"
    full.mkdir()
    cluster[2].mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", full)
    mounts.append((2, full))
    cluster[2].run("dd", "if=/dev/zero", f"of={full}/all", "bs=4096", "count=1")
    lines = refused(cluster, "full")
    assert any(re.match(r"error: node3: --codes: differs \(sha256 \w+\.\.\., on node1 \w+", line) for line in lines)
    assert "error: node2: --out full: cannot be written (No space left on device)" in lines


def test_a_taken_port_and_a_missing_environment(cluster: Cluster, mounts: list[tuple[int, Path]]) -> None:
    listener = "import socket, sys; s = socket.create_server(('', 29777)); print('up', flush=True); sys.stdin.read()"
    import subprocess

    taken = subprocess.Popen(
        cluster[1].command(BIN / "python", "-c", listener), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert taken.stdin is not None and taken.stdout is not None and taken.stdout.readline() == "up\n"
    cluster[2].mount("-t", "tmpfs", "tmpfs", BIN)
    mounts.append((2, BIN))
    try:
        lines = refused(cluster, "taken", "--master_port", 29777)
    finally:
        taken.stdin.close()
        taken.wait(20)
    assert "error: node1: port 29777 is taken; choose another --master_port" in lines
    assert any(line.startswith("error: node2: has no ksub_ds at the same path as here") for line in lines)
    assert not (cluster.folder / "taken").exists()


def test_no_sshd(cluster: Cluster) -> None:
    """A host that is not there."""
    hostfile = cluster.folder / "hosts-unknown"
    hostfile.write_text("node1 slots=1\nnowhere slots=1\n")
    done = cluster.launch(hostfile, *cluster.arguments("nowhere"), host=0).finish()
    assert done.code == 2
    assert "error: nowhere: cannot be reached: ssh: Could not resolve hostname nowhere" in done.text
