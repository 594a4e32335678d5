"""The paper's Tables 2, 3 and 4, in percent, to compare ours with."""

from ksub_ds.evaluate.data.tasks import CROSS_LINGUAL, GLUE_TASKS, LANGUAGES, TRANSLATE_TRAIN_ALL


def _row(names: tuple[str, ...], numbers: str) -> dict[str, float]:
    return dict(zip(names, map(float, numbers.split()), strict=True))


# Table 4, XLM-R-MEDIUM, K = 3: setting -> kind of embedding -> language -> accuracy. Averages as printed.
_XNLI = (*LANGUAGES, "average")
XNLI = {
    CROSS_LINGUAL: {
        "plain": _row(_XNLI, "74.0 56.6 60.5 55.1 49.4 53.5 52.0 45.0 35.1 54.5 41.5 52.4 42.0 45.1 43.3 50.7"),
        "positional": _row(_XNLI, "72.6 55.4 54.7 48.4 45.0 51.0 49.8 43.4 35.1 50.8 36.4 44.2 40.2 45.9 43.2 47.7"),
        "clustered": _row(_XNLI, "72.9 55.4 54.1 51.9 49.8 51.9 51.1 45.5 35.0 49.7 44.3 45.0 42.5 44.3 40.6 48.9"),
    },
    TRANSLATE_TRAIN_ALL: {
        "plain": _row(_XNLI, "77.0 72.4 74.3 73.0 71.7 70.9 69.0 69.0 58.7 72.3 61.2 63.8 61.0 63.5 62.8 68.0"),
        "positional": _row(_XNLI, "72.7 69.6 68.6 68.1 67.0 65.1 65.6 63.2 59.7 69.6 60.0 58.3 61.7 61.9 58.2 64.6"),
        "clustered": _row(_XNLI, "74.7 69.9 71.5 69.6 68.3 67.6 67.6 66.8 60.8 71.7 62.1 62.0 63.3 62.4 60.4 66.6"),
    },
}

# Tables 2 and 3, RoBERTa-MEDIUM: name -> (kind, task -> score).
_GLUE = tuple(GLUE_TASKS)
GLUE = {
    "plain": ("plain", _row(_GLUE, "89.9 79.6 88.2 86.6 72.9 88.4 38.1 88.1")),
    "K=2 M=225": ("positional", _row(_GLUE, "88.6 74.3 84.0 84.0 66.8 88.1 35.7 79.3")),
    "K=3 M=37": ("positional", _row(_GLUE, "88.0 73.2 83.5 83.0 67.9 85.6 18.4 77.4")),
    "K=4 M=15": ("positional", _row(_GLUE, "88.1 72.7 84.2 83.4 70.0 87.5 23.3 78.5")),
    "K=6 M=7": ("positional", _row(_GLUE, "87.4 73.6 84.2 82.6 67.5 85.3 25.6 79.6")),
    "K=8 M=4": ("positional", _row(_GLUE, "88.1 73.1 83.1 83.1 67.9 86.4 20.1 76.5")),
    "k-means M=100": ("clustered", _row(_GLUE, "88.2 75.9 85.1 84.7 67.1 87.3 37.5 81.6")),
    "k-means M=200": ("clustered", _row(_GLUE, "90.0 77.6 85.5 85.6 69.7 88.7 34.9 84.5")),
    "equal M=50": ("clustered", _row(_GLUE, "89.3 75.8 83.5 84.6 67.9 87.7 33.6 80.2")),
    "equal M=100": ("clustered", _row(_GLUE, "89.3 77.2 85.8 84.8 70.8 87.4 36.8 84.9")),
}


def glue_row(kind: str, num_tables: int | None) -> tuple[str, dict[str, float]] | None:
    """Return the row to compare a model with: plain, positional with as many tables, or the best balanced one."""
    if kind == "plain":
        return "plain", GLUE["plain"][1]
    if kind == "clustered":
        return "equal M=100", GLUE["equal M=100"][1]
    for name, (theirs, row) in GLUE.items():
        if theirs == kind and name.startswith(f"K={num_tables} "):
            return name, row
    return None
