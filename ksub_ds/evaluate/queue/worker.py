"""Workers: what drains the queues of some plans, in one process among any number."""

import abc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.queue.queue import ClaimLost, Job, Queue


class Plan(abc.ABC):
    """What workers drain: a queue, how to do its jobs, and what to write when all are done."""

    queue: Queue

    @abc.abstractmethod
    def run(self, jobs: list[Job], still_ours: Callable[[], None]) -> list[dict[str, Any]]:
        """Do some jobs of one group; `still_ours` raises ClaimLost when going on is useless."""

    def forget(self, job: Job) -> None:  # noqa: B027 - most have nothing to remove
        """Remove what only a continuation of a job would need: its result is out."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Write what follows from all results; may be called by several workers."""


def drain(plans: Sequence[Plan], poll_seconds: float = 1.0) -> None:
    """Work until every job of every plan is done, by this process or another.

    Raises:
        UserError: a job cannot be done.
    """
    open_plans, told = list(plans), 0.0
    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(plan.queue.presence())
        while open_plans:
            for plan in list(open_plans):
                if plan.queue.all_done():
                    plan.finish()
                    open_plans.remove(plan)
                elif _work_once(plan):
                    break
            else:
                if open_plans:
                    if time.monotonic() - told > 60:
                        told = time.monotonic()
                        get_logger().info("waiting: other workers hold the jobs that are left")
                    time.sleep(poll_seconds)


def _work_once(plan: Plan) -> bool:
    """Do one round of work; False when nothing was free."""
    with plan.queue.claim_some() as claims:
        if not claims:
            return False
        try:
            results = plan.run([claim.job for claim in claims], claims.check)
            for claim, result in zip(claims, results, strict=True):
                claim.publish(result)
                plan.forget(claim.job)
        except ClaimLost as lost:
            get_logger().info(f"{lost}: another worker has it; dropped here")
    return True
