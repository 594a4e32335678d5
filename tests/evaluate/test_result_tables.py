"""Tables: what users name is escaped in Markdown, LaTeX and CSV."""

from ksub_ds.evaluate.result_tables import render


def test_cells_are_escaped() -> None:
    row = ["a|b\n_&%", "1"]
    assert "a\\|b _&%" in render("t", ["m", "n"], [row], "markdown")
    assert r"a|b" in render("t", ["m", "n"], [row], "latex") and r"\_\&\%" in render("t", ["m", "n"], [row], "latex")
    assert '"a|b\n_&%",1' in render("t", ["m", "n"], [row], "csv")
