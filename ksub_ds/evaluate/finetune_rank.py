"""One rank of a fine-tuning that several processes share; started by a worker (finetune/ranks.py), never by hand.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... python -m ksub_ds.evaluate.finetune_rank OUT/work/JOB/ranks/task.json PARENT
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import USER_ERROR
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.finetune.ranks import RESULT, RankTask


def _exit_with(parent: int) -> None:
    """Exit when the worker does: killed by SIGKILL, it cannot end its ranks."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(path: Path, parent: int) -> int:
    """Do this rank's part of the task and return the exit code; rank 0 writes result.json beside the task.

    Does not return when it fails otherwise than by the user's mistake: the watchdog ends all ranks.

    Args:
        path: the task, as JSON.
        parent: process id of the worker.
    """
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    from ksub_ds.evaluate.finetune.train_classifier import train_classifier
    from ksub_ds.evaluate.registry import plan_of

    try:
        task = RankTask(**read_json(path))
        distributed.init_distributed()
        if not distributed.is_main():
            get_logger().setLevel(logging.ERROR)
        plan = distributed.raise_on_all_ranks(lambda: plan_of(task))
        result = train_classifier(plan.training(plan.finetune_job(task.job)), several_ranks=True)
        if distributed.is_main():
            write_json(path.with_name(RESULT), result)
        return 0
    except UserError as error:
        print(f"error: rank {distributed.rank()}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Exception as error:
        watchdog = distributed.watchdog()
        if watchdog is None:
            raise
        return watchdog.end_by(error)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    distributed.leave(main(Path(sys.argv[1]), int(sys.argv[2])))
