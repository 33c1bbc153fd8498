"""Writes runs/ID/report.html, one file that opens without network access (docs/report.md)."""

from typing import Any

from palimpsest.common import run_folder
from palimpsest.common.files import write
from palimpsest.services.report.figures import figures
from palimpsest.services.report.folder import Contents
from palimpsest.services.report.page import page
from palimpsest.services.report.trajectories import chosen_trajectories


def write_report(contents: Contents, summary: dict[str, Any]) -> None:
    """Write the folder's report."""
    text = page(summary, contents.config, figures(contents), contents.lines, chosen_trajectories(contents))
    write(contents.folder / run_folder.REPORT, text.encode())
