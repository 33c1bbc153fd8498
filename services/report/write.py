"""runs/ID/report.html: a run in figures, one file that opens without network (docs/report.md)."""

from typing import Any

from common.files import write
from services.report.figures import figures
from services.report.folder import Contents
from services.report.page import page

REPORT = "report.html"


def write_report(contents: Contents, summary: dict[str, Any]) -> None:
    """Make the folder's report."""
    write(contents.folder / REPORT, page(summary, contents.config, figures(contents)).encode())
