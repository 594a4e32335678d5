"""The report of a run as one self-contained HTML page: no network, no script, no file beside it.

    ksub report run --html report.html

It reads the run folder as it is, finished or not. Every number in it carries its exact value (page.py).
"""

from collections.abc import Sequence
from pathlib import Path

from ksub_ds.analysis import result_sections, run_sections
from ksub_ds.analysis.page import text
from ksub_ds.analysis.run_files import read_results, read_run
from ksub_ds.common.errors import UserError
from ksub_ds.common.files import atomic_path
from ksub_ds.common.logging import get_logger

STYLE = Path(__file__).parent / "templates" / "report.css"
# enforces what the page promises: nothing is fetched, nothing runs, even if a name should slip through the escaping
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run: Path, html: Path, results: Sequence[Path] = ()) -> None:
    """Write the report of a run.

    Args:
        run: a run folder of `ksub pretrain`.
        html: the page to write.
        results: folders of `ksub evaluate` (results.json) and of `ksub analyze` (analysis.json), to be shown too.

    Raises:
        UserError: not a run, nothing usable in one of `results`, or `html` cannot be written.
    """
    files = read_run(Path(run))
    found, analyses = read_results([Path(each) for each in results])
    sections = [
        run_sections.heading(files),
        run_sections.parameters(files),
        run_sections.learning(files),
        result_sections.scores(found),
        result_sections.analyses(analyses),
        run_sections.speed(files),
        run_sections.codes(files),
        run_sections.provenance(files),
    ]
    page = _page(f"Run {files.path.resolve().name}", [part for part in sections if part])
    try:
        with atomic_path(Path(html)) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {html}: cannot be written ({error.strerror}); choose another place") from error
    get_logger().info(f"{html}: {len(page.encode()) / 1e6:.1f} MB, one page")


def _page(title: str, sections: Sequence[str]) -> str:
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>"
    )
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
