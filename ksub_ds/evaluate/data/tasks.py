"""The tasks: columns, classes, metrics, and the order of the paper's tables."""

from dataclasses import dataclass

from ksub_ds.common.languages import TABLE_4_ORDER
from ksub_ds.evaluate.data.rows import Columns

LANGUAGES = TABLE_4_ORDER
NLI_LABELS = ("entailment", "neutral", "contradiction")
# The machine-translated training sets of XLM's distribution spell the last class otherwise.
XNLI_COLUMNS = Columns("premise", "hypothesis", NLI_LABELS, (("contradictory", 2),))

CROSS_LINGUAL, TRANSLATE_TRAIN_ALL = "cross-lingual", "translate-train-all"


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE.

    Attributes:
        columns: what a row holds; no class names = regression.
        metrics: what is measured; the first chooses the best epoch and cell.
        from_mnli: starts from the checkpoint fine-tuned on MNLI (Liu et al. 2019, section 5.1).
    """

    columns: Columns
    metrics: tuple[str, ...]
    from_mnli: bool = False

    @property
    def regression(self) -> bool:
        """Whether the label is a real number."""
        return not self.columns.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model."""
        return len(self.columns.labels) or 1


# Tables 2 and 3's order. The paper gives one number for MRPC, QQP and STS-B without saying which: both are kept.
GLUE_TASKS = {
    "sst2": GlueTask(Columns("sentence", None, ("negative", "positive")), ("accuracy",)),
    "mnli": GlueTask(XNLI_COLUMNS, ("accuracy",)),
    "qnli": GlueTask(Columns("question", "sentence", ("entailment", "not_entailment")), ("accuracy",)),
    "qqp": GlueTask(Columns("question1", "question2", ("not_duplicate", "duplicate")), ("accuracy", "f1")),
    "rte": GlueTask(Columns("sentence1", "sentence2", ("entailment", "not_entailment")), ("accuracy",), True),
    "mrpc": GlueTask(Columns("sentence1", "sentence2", ("not_equivalent", "equivalent")), ("accuracy", "f1"), True),
    "cola": GlueTask(Columns("sentence", None, ("unacceptable", "acceptable")), ("matthews", "accuracy")),
    "stsb": GlueTask(Columns("sentence1", "sentence2", ()), ("pearson", "spearman"), True),
}
# Rows of MNLI's development sets when both stand in one file: matched first.
MNLI_MATCHED_ROWS = 9_815
