"""From settings to the plans that workers drain."""

from pathlib import Path
from typing import Any

from ksub_ds.evaluate.glue import GluePlan
from ksub_ds.evaluate.settings import GlueSettings, XnliSettings
from ksub_ds.evaluate.xnli import XnliPlan

KINDS: dict[str, tuple[Any, Any]] = {"xnli": (XnliSettings, XnliPlan), "glue": (GlueSettings, GluePlan)}


def make_plans(settings: Any) -> list[Any]:
    """One plan a model.

    Raises:
        UserError: settings, data or a model that cannot be used.
    """
    settings = settings.checked()
    plan = next(plan for kind, plan in KINDS.values() if isinstance(settings, kind))
    return [plan(settings, model, folder) for model, folder in settings.folders().items()]


def plan_from_json(values: dict[str, Any]) -> Any:
    """The plan that a worker described for its ranks."""
    kind, plan = KINDS[values["plan"]]
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values["settings"].items()
    }
    for key in ("out", "cache"):
        given[key] = None if given[key] is None else Path(given[key])
    return plan(kind(**given), values["model"], Path(values["folder"]))
