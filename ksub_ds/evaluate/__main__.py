"""What `ksub evaluate` calls, and one worker of `launch/evaluate.sh` or a SLURM array.

    python -m ksub_ds.evaluate xnli --model model --data xnli --setting cross-lingual --out results
    launch/evaluate.sh --hostfile launch/hostfile.example xnli --model model ...    (one such worker a slot)

From settings to results.json: registry.py makes a plan for each model (benchmark.py; xnli.py, glue.py, classify.py; for
lm language_model.py does), a plan has a queue of jobs (queue/queue.py), a worker does them (queue/worker.py), and
whoever sees the last one done writes the results.

Exit codes: 0 all is done; 2 the user's mistake, one line on stderr; 70 a rank of a job failed; 130 Ctrl-C, 143 SIGTERM,
129 SIGHUP (a closed terminal or ssh): the leased jobs are given back, and the same command resumes.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ksub_ds.common.errors import UserError
from ksub_ds.common.exit_codes import exit_code_of_signal, run_main
from ksub_ds.common.options import parse
from ksub_ds.evaluate.benchmark import BenchmarkPlan
from ksub_ds.evaluate.language_model import LanguageModelPlan, LanguageModelSettings, make_language_model_plans
from ksub_ds.evaluate.queue.queue import StatusSettings, status
from ksub_ds.evaluate.queue.worker import run_worker
from ksub_ds.evaluate.registry import SETTINGS, make_plans
from ksub_ds.evaluate.settings import EvaluationSettings
from ksub_ds.evaluate.watch import WatchSettings, watch

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Subcommand(Generic[Settings]):
    """One `ksub evaluate NAME`: its options, and what it does with them."""

    settings: type[Settings]
    run: Callable[[Settings], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        text = f"usage: ksub evaluate {'|'.join(COMMANDS)} [OPTIONS]; `ksub evaluate NAME --help` lists the options"
        print(text if asked else f"error: {text}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    ends = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]  # nohup
    before = {number: signal.signal(number, _exit_by_exception) for number in ends}
    try:
        return run_main(lambda: COMMANDS[arguments[0]].run(parse_settings(arguments)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_by_exception(number: int, frame: Any) -> None:
    """Leave by an exception on SIGTERM and SIGHUP, so that leases are given back.

    Raises:
        SystemExit: always, with the exit code of the signal.
    """
    raise SystemExit(exit_code_of_signal(number))


def parse_settings(arguments: Sequence[str]) -> Any:
    """Return the settings of `ksub evaluate NAME ...`.

    Raises:
        UserError: no NAME, an unknown one, or wrong options.
    """
    if not arguments or arguments[0] not in COMMANDS:
        found = f", not {arguments[0]}" if arguments else ""
        raise UserError(f"name one of {', '.join(COMMANDS)} first{found}")
    return parse(COMMANDS[arguments[0]].settings, arguments[1:], f"ksub evaluate {arguments[0]}")


def _evaluate(settings: EvaluationSettings | LanguageModelSettings) -> None:
    _use_own_gpu()
    if isinstance(settings, LanguageModelSettings):
        plans: Sequence[BenchmarkPlan[Any] | LanguageModelPlan] = make_language_model_plans(settings)
    else:
        plans = make_plans(settings)
    run_worker(plans)
    for plan in plans:
        print(plan.summary())


def _use_own_gpu() -> None:
    """Share the GPUs of a machine among its workers, by their order on it."""
    from ksub_ds.common.rank_env import has_gpu
    from ksub_ds.evaluate.finetune.ranks import worker_on_machine

    if has_gpu():
        import torch

        torch.cuda.set_device(worker_on_machine() % torch.cuda.device_count())


def _print_status(settings: StatusSettings) -> None:
    print(status(settings))


COMMANDS: dict[str, Subcommand[Any]] = {
    **{name: Subcommand(settings, _evaluate) for name, settings in SETTINGS.items()},
    "lm": Subcommand(LanguageModelSettings, _evaluate),
    "watch": Subcommand(WatchSettings, watch),
    "status": Subcommand(StatusSettings, _print_status),
}


if __name__ == "__main__":
    sys.exit(main())
