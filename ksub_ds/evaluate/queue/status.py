"""The state of an evaluation: which jobs are done, who holds which, which are free or waiting.

ksub evaluate status results
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ksub_ds.common.errors import UserError
from ksub_ds.common.logging import format_seconds
from ksub_ds.evaluate.queue.queue import Queue


@dataclass(frozen=True)
class StatusSettings:
    """Show the queue of an evaluation: every job that is not done, and who holds it."""

    out: Positional[Path]
    """The --out folder of `ksub evaluate xnli` or `glue` (or of several models)."""


def status(settings: StatusSettings) -> str:
    """Describe the queues below a folder in text.

    Raises:
        UserError: there is none, or its plan.json is damaged.
    """
    found = sorted(settings.out.glob("**/queue/plan.json"))
    if not found:
        raise UserError(f"{settings.out}: holds no evaluation; give the --out folder of `ksub evaluate xnli` or `glue`")
    return "\n\n".join(_describe(Queue.read(path.parent.parent)) for path in found)


def _describe(queue: Queue) -> str:
    lines, states = [], Counter[str]()
    for name in queue.jobs:
        state, detail = _state(queue, name)
        states[state] += 1
        if state != "done":
            lines.append((name, state, detail))
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    text = f"{queue.folder} ({queue.identity.get('kind')}): {len(queue.jobs)} jobs: {counts}"
    if not lines:
        return text + ("" if (queue.folder / "results.json").exists() else "; any worker will write results.json")
    width = max(len(name) for name, *_ in lines)
    return "\n".join([text, *(f"  {name:<{width}}  {state:<8} {detail}".rstrip() for name, state, detail in lines)])


def _state(queue: Queue, name: str) -> tuple[str, str]:
    """Return the state of a job in one word, and what else there is to say of it."""
    if queue.is_done(name):
        return "done", ""
    holder = queue.holder(name)
    if holder is not None:
        who = f"process {holder.process} on {holder.host}"
        tries = f", try {holder.number}" if holder.number > 1 else ""
        if holder.alive:
            since = max(0.0, queue.leases.now() - holder.since)
            return "running", f"{who}, for {format_seconds(since)}{tries}"
        return "left", f"by {who}{tries}; the next worker takes it over"
    waits = [need for need in queue.jobs[name].needs if not queue.is_done(need)]
    if waits:
        return "waiting", f"for {waits[0]}" + (f" and {len(waits) - 1} more" if len(waits) > 1 else "")
    return "free", ""
