"""Reading labelled rows: label order, -1, missing columns, empty and damaged files, each named by file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.evaluate.data.rows import Columns, RowSource
from ksub_ds.evaluate.data.tasks import GLUE_TASKS, NLI_LABELS, XNLI_COLUMNS

GOOD = {"premise": "a bird sings", "hypothesis": "it is loud", "label": 1}


def source(tmp_path: Path, lines: list[Any], name: str = "test.jsonl") -> RowSource:
    path = tmp_path / "en" / name
    path.parent.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode("utf-8", "surrogateescape"))
    return RowSource(str(tmp_path))


def test_label_order_is_that_of_the_published_data(tmp_path: Path) -> None:
    """facebook/xnli and nyu-mll/glue: 0 entailment, 1 neutral, 2 contradiction."""
    spelt = [GOOD | {"label": name} for name in ("entailment", "neutral", "contradiction", "contradictory")]
    assert source(tmp_path, spelt).read("en", "test", XNLI_COLUMNS).labels == [0, 1, 2, 2]
    assert NLI_LABELS == GLUE_TASKS["mnli"].columns.labels == ("entailment", "neutral", "contradiction")
    assert GLUE_TASKS["rte"].columns.labels == ("entailment", "not_entailment")
    assert GLUE_TASKS["stsb"].regression and GLUE_TASKS["stsb"].num_labels == 1


@given(st.sampled_from([*enumerate(NLI_LABELS), (2, "contradictory")]), st.randoms(use_true_random=False))
def test_names_of_classes_in_any_case(named: tuple[int, str], draw: Any) -> None:
    number, name = named
    spelt = "".join(draw.choice((letter.upper(), letter)) for letter in name)
    assert XNLI_COLUMNS.label(f" {spelt}\t") == XNLI_COLUMNS.label(number) == XNLI_COLUMNS.label(str(number)) == number
    assert GLUE_TASKS["rte"].columns.label("Not-Entailment") == GLUE_TASKS["rte"].columns.label("not entailment") == 1


def test_a_label_map_is_the_whole_truth_about_numbers(tmp_path: Path) -> None:
    other = XNLI_COLUMNS.mapped(("0=contradiction", "1=entailment", "oui=entailment", "-1=neutral", "9=positive"))
    rows = [GOOD | {"label": label} for label in (0, 1, "oui", -1, "neutral", 0.0, "1")]
    assert source(tmp_path, rows).read("en", "test", other).labels == [2, 0, 0, 1, 1, 2, 0]
    with pytest.raises(UserError, match=r"line 1: label 2 is not in --label-map"):
        source(tmp_path, [GOOD | {"label": 2}]).read("en", "test", other)
    named = Columns("premise", "hypothesis", ("1", "2", "3"))  # a number that is a name is not a position
    assert [named.label(label) for label in (1, "2", 3.0)] == [0, 1, 2]
    with pytest.raises(ValueError, match="label 0 is not one of"):
        named.label(0)


def test_the_class_names_of_a_parquet_file_count(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "en").mkdir()
    path = tmp_path / "en" / "test.parquet"

    def save(names: list[str]) -> None:
        features = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")}
        label = {"label": datasets.ClassLabel(names=names)}
        columns = {key: [GOOD[key]] * 3 for key in features} | {"label": [0, 1, 2]}
        datasets.Dataset.from_dict(columns, datasets.Features(features | label)).to_parquet(path)

    def labels(columns: Columns = XNLI_COLUMNS) -> list[float]:
        return RowSource(str(tmp_path)).read("en", "test", columns).labels

    save(["contradiction", "Entailment", "neutral"])
    assert labels() == [2, 0, 1]
    for names in (list(NLI_LABELS), ["0", "1", "2"]):
        save(names)
        assert labels() == [0, 1, 2]
    save(["no", "maybe", "yes"])
    with pytest.raises(UserError, match=r"label 0 is 'no' by the file's own class names.*--label-map 'no=CLASS'"):
        labels()
    assert labels(XNLI_COLUMNS.mapped(("no=contradiction", "maybe=neutral", "yes=entailment"))) == [2, 1, 0]
    assert RowSource(str(tmp_path)).classes("en", "test", "label") == (("no", "maybe", "yes"), True)


def test_unlabelled_rows_are_counted_or_kept(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"label": None}, GOOD | {"label": -1}, GOOD | {"label": ""}, GOOD | {"label": "-1"}, GOOD]
    found = source(tmp_path, rows)
    with pytest.raises(UserError, match=r"line 2: label null stands for an unlabelled row.*4 of 6 rows are such"):
        found.read("en", "test", XNLI_COLUMNS)
    kept = found.read("en", "test", XNLI_COLUMNS, unlabelled=True)
    assert len(kept) == 6 and kept.labelled() == 2
    bare = {key: value for key, value in GOOD.items() if key != "label"}
    assert source(tmp_path, [bare]).read("en", "test", XNLI_COLUMNS, unlabelled=True).labelled() == 0
    with pytest.raises(UserError, match=r"no column 'label'; every row needs .*; found premise, hypothesis"):
        source(tmp_path, [bare]).read("en", "test", XNLI_COLUMNS)
    with pytest.raises(UserError, match="line 1: premise is null, not text"):
        source(tmp_path, [GOOD | {"premise": None}]).read("en", "test", XNLI_COLUMNS)


def test_classes_are_found_in_the_data(tmp_path: Path) -> None:
    for labels, classes in (
        (["b", "a", "b", None], (("a", "b"), False)),
        ([10, 9, 1.0, -1], (("1", "9", "10"), True)),
        ([True, False], (("false", "true"), False)),
    ):
        found = source(tmp_path, [{"label": label} for label in labels]).classes("en", "test", "label")
        assert found == classes
    for labels, message in ((["a", "a"], "one class"), ([-1], "no class"), ([[1]], "label is list, not a class")):
        with pytest.raises(UserError, match=message):
            source(tmp_path, [{"label": label} for label in labels]).classes("en", "test", "label")
    with pytest.raises(UserError, match="more than 1,000 values"):
        source(tmp_path, [{"label": f"v{number}"} for number in range(1_001)]).classes("en", "test", "label")
    with pytest.raises(UserError, match="no column 'y'; found label"):
        source(tmp_path, [{"label": 1}]).classes("en", "test", "y")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"label": -1}, "line 2: label -1 stands for an unlabelled row"),
        (GOOD | {"label": 3}, "line 2: label 3 is not one of 0 to 2"),
        (GOOD | {"label": 0.5}, "line 2: label 0.5 is not one of 0 to 2"),
        (GOOD | {"label": "maybe"}, "line 2: label 'maybe' is not one of entailment, neutral, contradiction"),
        (GOOD | {"label": True}, "line 2: label True is not a number"),
        (GOOD | {"label": 10**400}, "line 2: label 10000000000000000000 is not a number"),
        ({"premise": "a", "label": 1}, "line 2 has no column 'hypothesis'"),
        (GOOD | {"more": 1}, "line 2 has 4 columns, the first row 3"),
        (GOOD | {"premise": 7}, "line 2: premise is int, not text"),
        ([1, 2], "line 2 is not a JSON object"),
        ("{", "line 2 is not JSON"),
        ("\udcff", "line 2 is not UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        source(tmp_path, [GOOD, row, GOOD]).read("en", "test", XNLI_COLUMNS)
    assert message in str(caught.value) and "test.jsonl" in str(caught.value)


def test_empty_damaged_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        source(tmp_path, []).read("en", "test", XNLI_COLUMNS)
    whole = source(tmp_path, [GOOD] * 200, "train.jsonl.gz")
    path = tmp_path / "en" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged or cut short"):
        whole.read("en", "train", XNLI_COLUMNS)
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="line 1 is not JSON; the file is damaged"):
        whole.read("en", "train", XNLI_COLUMNS)
    with pytest.raises(UserError, match="is not there"):
        whole.read("fr", "test", XNLI_COLUMNS)
    (tmp_path / "en" / "validation.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="not a readable Parquet"):
        whole.read("en", "validation", XNLI_COLUMNS)
    for name in ("no/such/folder", "./folder", "one-word"):
        with pytest.raises(UserError, match="is not a folder, nor a data set's name"):
            RowSource(name)


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksub_ds.common.compression.INFLATION_FREE", 100_000)
    bomb = source(tmp_path, [" " * 50_000] * 100, "test.jsonl.gz")
    with pytest.raises(UserError, match="inflates to more than"):
        bomb.read("en", "test", XNLI_COLUMNS)


def test_limits_parquet_and_regression(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"sentence1": "a", "sentence2": f"b{i}", "label": i / 2, "idx": i} for i in range(6)]
    (tmp_path / "stsb").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "stsb" / "train.parquet")
    read = RowSource(str(tmp_path)).read("stsb", "train", GLUE_TASKS["stsb"].columns, limit=4)
    assert read.labels == [0.0, 0.5, 1.0, 1.5] and read.second == ["b0", "b1", "b2", "b3"]
    single = Columns("sentence", None, ("no", "yes"))
    path = tmp_path / "cola" / "train.jsonl"
    path.parent.mkdir()
    path.write_text('\ufeff{"sentence": "\\ud800 half", "label": 1}\n\n')
    assert RowSource(str(tmp_path)).read("cola", "train", single).first == ["? half"]


def test_parquet_bombs_and_bad_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "en" / "test.parquet"
    path.parent.mkdir()
    long = {"premise": "a" * 50_000, "hypothesis": "b", "label": 0}
    parquet.write_table(pyarrow.Table.from_pylist([long] * 100), path)  # one string in the file, a hundred in memory
    assert path.stat().st_size < 10_000
    assert len(RowSource(str(tmp_path)).read("en", "test", XNLI_COLUMNS)) == 100
    with monkeypatch.context() as patch:
        patch.setattr("ksub_ds.common.compression.INFLATION_FREE", 100_000)
        with pytest.raises(UserError, match="inflates to more than"):
            RowSource(str(tmp_path)).read("en", "test", XNLI_COLUMNS)
    monkeypatch.setattr("ksub_ds.evaluate.data.row_files.LONGEST_LINE", 1_000)
    with pytest.raises(UserError, match="line 1: premise has 50,000 characters"):
        RowSource(str(tmp_path)).read("en", "test", XNLI_COLUMNS, limit=1)
    late = {"premise": ["a"], "hypothesis": ["b"], "label": [0], "at": pyarrow.array([2**62], pyarrow.timestamp("us"))}
    parquet.write_table(pyarrow.table(late), path)
    with pytest.raises(UserError, match="row 1 or soon after: date value out of range"):
        RowSource(str(tmp_path)).read("en", "test", XNLI_COLUMNS)
    text = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    columns = {"premise": text, "hypothesis": ["b"], "label": [0]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match="is not UTF-8"):
        RowSource(str(tmp_path)).read("en", "test", XNLI_COLUMNS)
