"""Evaluate: what `ksub evaluate` calls, and one worker of `launch/evaluate.sh` or a SLURM array.

    python -m ksub_ds.evaluate xnli --model model --data xnli --setting cross-lingual --out results
    launch/evaluate.sh --hostfile launch/hostfile.example xnli --model model ...    (two workers of the same)

Exit codes: 0 all is done; 2 the user's mistake, one line on stderr; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP (a closed
terminal or ssh): the claimed jobs are given back, and the same command continues.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import exit_code_of_signal, run_main
from ksub_ds.common.options import parse

NAMES = ("xnli", "glue", "watch", "status")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "xnli": _work,
        "glue": _work,
        "watch": _watch,
        "status": _status,
    }
    if not arguments or arguments[0] not in commands:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        text = f"usage: ksub evaluate {'|'.join(NAMES)} [OPTIONS]; `ksub evaluate NAME --help` tells the options"
        print(text if asked else f"error: {text}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    ends = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]  # nohup
    before = {number: signal.signal(number, _end_in_order) for number in ends}
    try:
        return run_main(lambda: commands[arguments[0]](arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_in_order(number: int, frame: Any) -> None:
    """SIGTERM, SIGHUP: leave by an exception, so that claims are given back."""
    raise SystemExit(exit_code_of_signal(number))


def parse_settings(arguments: Sequence[str]) -> Any:
    """The settings of `ksub evaluate NAME ...`.

    Raises:
        UserError: no NAME, one that is not there, or wrong options.
    """
    from ksub_ds.evaluate.queue.status import StatusSettings
    from ksub_ds.evaluate.registry import KINDS
    from ksub_ds.evaluate.watch import WatchSettings

    kinds = {name: kind for name, (kind, _) in KINDS.items()} | {"watch": WatchSettings, "status": StatusSettings}
    if not arguments or arguments[0] not in kinds:
        found = f", not {arguments[0]}" if arguments else ""
        raise UserError(f"name one of {', '.join(NAMES)} first{found}")
    return parse(kinds[arguments[0]], arguments[1:], f"ksub evaluate {arguments[0]}")


def _work(arguments: Sequence[str]) -> None:
    from ksub_ds.evaluate.queue.worker import drain
    from ksub_ds.evaluate.registry import make_plans

    settings = parse_settings(arguments)
    _use_own_gpu()
    plans = make_plans(settings)
    drain(plans)
    for plan in plans:
        print(plan.summary())


def _use_own_gpu() -> None:
    """Workers on one machine share its GPUs by their place among each other."""
    from ksub_ds.common import distributed

    if distributed.has_gpu():
        import torch

        place = int(os.environ.get("KSUB_WORKER", distributed.local_rank()))
        torch.cuda.set_device(place % torch.cuda.device_count())


def _watch(arguments: Sequence[str]) -> None:
    from ksub_ds.evaluate.watch import watch

    watch(parse_settings(arguments))


def _status(arguments: Sequence[str]) -> None:
    from ksub_ds.evaluate.queue.status import status

    print(status(parse_settings(arguments)))


if __name__ == "__main__":
    sys.exit(main())
