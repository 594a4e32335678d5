"""Pretrain: the command that every launcher starts on each rank, and that `ksub pretrain` calls.

    python -m ksub_ds.pretrain --preset tiny --codes codes.safetensors --data shards --out run --max-steps 40
    launch/pretrain.sh --hostfile launch/hostfile.example --preset tiny ...    (the same, on 2 ranks)

Exit codes (ksub_ds/common/exit_codes.py has all):

    0     the last step was reached, or an (empty) STOP file or --max-hours ended the run in order
    2     the user's mistake, or a run that cannot go on (NaN, full disk): starting again changes nothing
    70    a rank failed, is lost or hangs: the same command may succeed, and continues from the last checkpoint
    75    stopped for a scheduler, saved; asks to be started again (SIGUSR1, or `echo requeue > RUN/STOP`, or
          --max-hours where KSUB_REQUEUE=1, as under launch/pretrain.sbatch)
    130   Ctrl-C, also before the first step; 143 SIGTERM: saved when training had begun

Of several ranks only one prints why the run ended, and its line is the last: `error: ...` with code 2, and with code
70 `failed: rank 3 on node2 at step 14: REASON; ...`. The same lies in RUN/failure.json, for launchers that mix the
codes of their ranks (pdsh gives the largest, mpirun the first): {"rank", "host", "step", "reason", "exit_code",
"restart_may_help", "time"}; the next start removes it, and one that is refused (code 2, before it has begun) leaves the
run folder as it was. A rank killed by a signal cannot write it; the ranks that miss
that rank do.
"""

import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ksub_ds.common import distributed
from ksub_ds.common.errors import RESUME, UserError
from ksub_ds.common.exit_codes import INTERRUPTED, USER_ERROR
from ksub_ds.common.watchdog import Failure, Watchdog

if TYPE_CHECKING:
    from ksub_ds.pretrain.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost peer, without C++ frames
    try:
        recipe = _parse(sys.argv[1:] if arguments is None else arguments)
        from ksub_ds.pretrain.run import run  # seconds of imports that --help does without

        return run(recipe)
    except KeyboardInterrupt:  # before the first step or after the last; in between the loop saves and returns
        return end_early(f"interrupted; {RESUME}", INTERRUPTED)
    except UserError as error:
        return end_early(str(error), USER_ERROR, error.agreed)
    except Exception as error:
        return (distributed.watchdog() or _alone()).end_by(error)
    finally:
        if "torch" in sys.modules:
            distributed.shutdown()


def _parse(words: Sequence[str]) -> "Recipe":
    """Parse the command line; with --extend on rank 0, which may be the only one that sees the run folder.

    Raises:
        UserError: on every rank: what is wrong with the arguments.
    """
    from ksub_ds.pretrain.recipe import extends_a_run, parse_recipe

    if not extends_a_run(words) or distributed.world_size() == 1:
        return parse_recipe(words)
    distributed.init_distributed()
    return distributed.broadcast_object(distributed.on_main(lambda: parse_recipe(words)))


def end_early(reason: str, exit_code: int, agreed: bool = False) -> int:
    """Print why the run ends, once for all ranks, and return the exit code. With several ranks it may not return.

    Args:
        reason: for the line.
        exit_code: of this process.
        agreed: every rank is here for the same reason.
    """
    watchdog = distributed.watchdog()
    if watchdog is None:  # before the rendezvous: all ranks are here, for the same reason
        watchdog = _alone()
        if watchdog.rank > 0:
            return exit_code
    elif agreed and not distributed.is_main():
        return watchdog.wait_for_main(exit_code)
    rank, host = watchdog.rank, watchdog.hosts[watchdog.rank]
    if watchdog.world_size > 1 and not agreed and exit_code == USER_ERROR:
        reason += f" (rank {rank} on {host})"
    return watchdog.end(Failure(rank, host, watchdog.step, reason, exit_code, restart_may_help=False))


def _alone() -> Watchdog:
    """Return a watchdog for this rank alone, to end the process before the rendezvous."""
    try:
        rank = distributed.rank()
    except UserError:  # the environment names no number
        rank = 0
    return Watchdog(rank, [socket.gethostname()] * (rank + 1))


if __name__ == "__main__":
    distributed.leave(main())
