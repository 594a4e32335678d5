"""From the settings of a benchmark to the plans that workers carry out."""

from pathlib import Path
from typing import Any

from ksub_ds.evaluate.benchmark import BenchmarkPlan
from ksub_ds.evaluate.classify import ClassifyPlan
from ksub_ds.evaluate.finetune.classifier import check_encoder
from ksub_ds.evaluate.finetune.ranks import RankTask
from ksub_ds.evaluate.glue import GluePlan
from ksub_ds.evaluate.settings import ClassifySettings, EvaluationSettings, GlueSettings, XnliSettings
from ksub_ds.evaluate.xnli import XnliPlan

PLANS: dict[type[EvaluationSettings], type[BenchmarkPlan[Any]]] = {
    XnliSettings: XnliPlan,
    GlueSettings: GluePlan,
    ClassifySettings: ClassifyPlan,
}
SETTINGS = {plan.kind: settings for settings, plan in PLANS.items()}


def make_plans(settings: EvaluationSettings) -> list[BenchmarkPlan[Any]]:
    """Return one plan for each model of the settings.

    Raises:
        UserError: settings, data or a model that cannot be used.
    """
    checked = settings.checked()
    for model in checked.model:
        check_encoder(model)
    return [PLANS[type(checked)](checked, model, folder) for model, folder in checked.folders().items()]


def plan_of(task: RankTask) -> BenchmarkPlan[Any]:
    """Return the plan that a worker described to its ranks."""
    settings = SETTINGS[task.plan].from_json(task.settings)
    return PLANS[type(settings)](settings, task.model, Path(task.folder))
