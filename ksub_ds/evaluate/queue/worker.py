"""A worker: one process among any number that does the jobs of some plans."""

import abc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.queue.leases import LeaseLost
from ksub_ds.evaluate.queue.queue import Job, Queue


class Plan(abc.ABC):
    """A queue, how to do its jobs, and what to write when all are done."""

    queue: Queue

    @abc.abstractmethod
    def run(self, jobs: Sequence[Job], check_lease: Callable[[], None]) -> list[dict[str, Any]]:
        """Do some jobs of one group.

        Args:
            jobs: in the order of the queue.
            check_lease: called now and then; raises LeaseLost when it is useless to go on.

        Returns:
            One result a job, as JSON values.
        """

    def forget(self, job: Job) -> None:  # noqa: B027 - most have nothing to remove
        """Remove what only a continuation of a job would need: its result is published."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Write what follows from all results; may be called by several workers."""


def run_worker(plans: Sequence[Plan], poll_seconds: float = 1.0) -> None:
    """Work until every job of every plan is done, by this process or another.

    Raises:
        UserError: a job cannot be done.
    """
    open_plans, logged = list(plans), 0.0
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
                    if time.monotonic() - logged > 60:
                        logged = time.monotonic()
                        get_logger().info("waiting: other workers hold the jobs that are left")
                    time.sleep(poll_seconds)


def _work_once(plan: Plan) -> bool:
    """Do one round of work; return False when nothing was free."""
    queue = plan.queue
    with queue.lease_some() as leases:
        if not leases:
            return False

        def check_lease() -> None:
            for lease in leases:
                lease.check()

        jobs = [queue.jobs[lease.name] for lease in leases]
        try:
            results = plan.run(jobs, check_lease)
            for job, lease, result in zip(jobs, leases, results, strict=True):
                queue.publish(lease, result)
                plan.forget(job)
        except LeaseLost as lost:
            get_logger().info(f"{lost}: another worker has it; dropped here")
    return True
