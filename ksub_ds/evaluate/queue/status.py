"""Where an evaluation stands: which jobs are done, who holds which, which are free or waiting.

ksub evaluate status results
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ksub_ds.common.errors import UserError
from ksub_ds.common.files import read_json
from ksub_ds.common.logging import format_seconds
from ksub_ds.evaluate.queue.queue import Queue


@dataclass(frozen=True)
class StatusSettings:
    """Show the queue of an evaluation: every job that is not done, and who holds it."""

    out: Positional[Path]
    """The --out folder of `ksub evaluate xnli` or `glue` (or of several models)."""


def status(settings: StatusSettings) -> str:
    """The queues below a folder, as text.

    Raises:
        UserError: there is none.
    """
    found = sorted(settings.out.glob("**/queue/plan.json"))
    if not found:
        raise UserError(f"{settings.out}: holds no evaluation; give the --out folder of `ksub evaluate xnli` or `glue`")
    return "\n\n".join(_one(path) for path in found)


def _one(path: Path) -> str:
    folder, plan = path.parent.parent, read_json(path)
    try:
        queue = Queue.opened(folder, plan["jobs"])
        kind = plan["kind"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error})") from error
    lines, states = [], Counter[str]()
    for name in queue.jobs:
        state, detail = _state(queue, name)
        states[state] += 1
        if state != "done":
            lines.append((name, state, detail))
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    text = f"{folder} ({kind}): {len(queue.jobs)} jobs: {told}"
    if not lines:
        return text + ("" if (folder / "results.json").exists() else "; any worker will write results.json")
    width = max(len(name) for name, *_ in lines)
    return "\n".join([text, *(f"  {name:<{width}}  {state:<8} {detail}".rstrip() for name, state, detail in lines)])


def _state(queue: Queue, name: str) -> tuple[str, str]:
    if queue.is_done(name):
        return "done", ""
    holder: dict[str, Any] | None = queue.holder(name)
    if holder is not None:
        who = f"process {holder.get('process')} on {holder.get('host')}"
        tries = f", try {holder['tries']}" if holder["tries"] > 1 else ""
        if holder["alive"]:
            since = max(0.0, queue.now() - holder.get("since", 0.0))
            return "running", f"{who}, for {format_seconds(since)}{tries}"
        return "left", f"by {who}{tries}; the next worker takes it over"
    waits = [need for need in queue.jobs[name].needs if not queue.is_done(need)]
    if waits:
        return "waiting", f"for {waits[0]}" + (f" and {len(waits) - 1} more" if len(waits) > 1 else "")
    return "free", ""
