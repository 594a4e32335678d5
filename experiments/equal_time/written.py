"""What an experiment leaves in its folder after every part: results.json, table.md and a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ksub_ds.common.files import atomic_path, write_json


def write_files(
    out: Path,
    results: dict[str, Any],
    markdown: Callable[[dict[str, Any]], str],
    plot: Callable[[Path, dict[str, Any]], None],
    picture: str,
) -> str:
    """Write the three files; return the table.

    Args:
        out: the folder.
        results: of the experiment, as JSON values.
        markdown: formats the table.
        plot: writes the picture to a path.
        picture: its name.
    """
    write_json(out / "results.json", results)
    table = markdown(results)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    plot(out / picture, results)
    return table
