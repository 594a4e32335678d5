"""Fine-tuning on several processes of this machine: start them, watch them, read their result.

What each of them runs is evaluate/finetune_rank.py; the task is told to them in WORK/ranks/task.json.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ksub_ds.common import distributed
from ksub_ds.common.errors import RunFailed, UserError
from ksub_ds.common.exit_codes import USER_ERROR
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.rank_env import has_gpu, local_rank

RESULT = "result.json"
REPORT_SECONDS = 5.0  # after a rank has ended, for the watchdogs of the others to say why


@dataclass(frozen=True)
class RankTask:
    """What a rank needs to do its part of a fine-tuning job.

    Attributes:
        plan: the kind of the plan ("xnli" or "glue").
        settings: of the evaluation, as JSON values.
        model: the one of settings.model that is evaluated.
        folder: of its queue.
        job: name of the job.
    """

    plan: str
    settings: dict[str, Any]
    model: str
    folder: str
    job: str


def train_on_ranks(task: RankTask, work: Path, ranks: int, check: Callable[[], None]) -> dict[str, Any]:
    """Have several processes of this machine do a fine-tuning job together.

    Args:
        task: what they do.
        work: the job's folder.
        ranks: how many.
        check: called every second; when it raises, the processes are ended.

    Returns:
        The result of rank 0, that of `train_classifier`.

    Raises:
        UserError: a rank met a mistake of the user's.
        RunFailed: a rank failed otherwise.
    """
    folder = work / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT
    result.unlink(missing_ok=True)
    write_json(folder / "task.json", asdict(task))
    command = [sys.executable, "-m", "ksub_ds.evaluate.finetune_rank", str(folder / "task.json"), str(os.getpid())]
    port = str(distributed.free_port())
    processes = []
    try:
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "LOCAL_RANK": place_on_machine(rank, ranks),
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
            }
            environment = os.environ | {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(subprocess.Popen(command, env=environment))
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                _wait_for_all(processes)
                break
            check()
            time.sleep(1)
    finally:
        own_codes = [process.poll() for process in processes]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if not result.exists():
        codes = ", ".join(str(process.returncode) for process in processes)
        error = UserError if USER_ERROR in own_codes else RunFailed
        raise error(f"{task.job}: its {ranks} ranks ended with exit codes {codes}; their messages stand above")
    outcome: dict[str, Any] = read_json(result)
    return outcome


def _wait_for_all(processes: list["subprocess.Popen[bytes]"]) -> None:
    """Wait until all have ended, but not for long: those that are left hang."""
    deadline = time.monotonic() + REPORT_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)


def place_on_machine(rank: int, ranks: int) -> int:
    """Return the number of a rank on this machine: of the GPU it takes, where there are any.

    Workers of one machine stand side by side, so the ranks of the second come after those of the first.
    """
    if not has_gpu():
        return rank
    import torch

    return (worker_on_machine() * ranks + rank) % torch.cuda.device_count()


def worker_on_machine() -> int:
    """Return the number of this worker among those of its machine, as `worker_command` or a launcher says."""
    return int(os.environ.get("KSUB_WORKER", local_rank()))
