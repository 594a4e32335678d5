"""One of the ranks that share a fine-tuning job; started by a worker, never by hand.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... python -m ksub_ds.evaluate.ranks OUT/work/JOB/ranks/task.json PARENT
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path

from ksub_ds.common import distributed
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json, write_json
from ksub_ds.common.logging import get_logger


def _exit_with(parent: int) -> None:
    """A worker killed by SIGKILL cannot tell its ranks: each watches for itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(task: Path, parent: int) -> int:
    """Do this rank's part of the job; rank 0 writes result.json beside the task."""
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    from ksub_ds.evaluate.registry import plan_from_json

    try:
        values = read_json(task)
        distributed.init_distributed()
        if not distributed.is_main():
            get_logger().setLevel(logging.ERROR)
        plan = distributed.raise_on_all_ranks(lambda: plan_from_json(values))
        result = plan.train(plan.queue.jobs[values["job"]], lambda: None, several_ranks=True)
        if distributed.is_main():
            write_json(task.with_name("result.json"), result)
        return 0
    except UserError as error:
        print(f"error: rank {distributed.rank()}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    distributed.leave(main(Path(sys.argv[1]), int(sys.argv[2])))
