"""The pictures of the README, made from a recorded run: docs/pictures/view.svg and docs/pictures/report.png.

python -m tools.pictures RUN_FOLDER [--folder docs/pictures] [--version N]

view.svg is the live view at the moment when version N (default: the middle of the run) was in force. It is drawn by
the code of the live view, from the run's history and from what its workers wrote to the log. The snapshot store and
the gateway write no status to the log, so their rows are left out. report.png is the top of report.html in a headless
Chromium; without a Chromium it is left as it is.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from palimpsest.common import program, run_folder
from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.offline import open_existing_bus, read_existing
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import WORKERS, VersionApplied, WorkerAlive
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.live.history_tail import accumulate
from palimpsest.services.live.poller import RunObservation, ServiceObservation, StatusReply
from palimpsest.services.live.state import LEARNER, Plan, State, state
from palimpsest.services.live.view import view
from palimpsest.services.report.folder import Line, Seconds, history, read_run_config, read_seconds

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 108, 40
WINDOW = "1200,1420"
"""Pixels of the report's picture: its tiles, its curves, and the figure of discrepancy and staleness ratio."""
RATE_S = 10.0
"""The rate of sampling is measured over about so many seconds, as in the live view."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_LIMIT_S = 300.0
WEB_FONT = re.compile(r"@font-face \{[^}]*\}\s*")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, runs/ID")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--version", type=int, default=None)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "view.svg").write_text(draw(state_at(options.run, options.version)))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"report.png is left as it is: none of {', '.join(BROWSERS)} is installed")
    photograph(browser, options.run / run_folder.REPORT, options.folder / "report.png")


def state_at(folder: Path, version: int | None = None) -> State:
    """The run's state when a worker first reported after it applied `version`.

    Raises UserError when the folder is no run's, or the run has not got that far.
    """
    config = read_run_config(folder)
    lines = list(history(folder / run_folder.HISTORY))
    wanted = len(lines) // 2 if version is None else version
    if not 1 <= wanted <= len(lines):
        raise UserError(f"{folder}: version {wanted}: the history has versions 1 to {len(lines)}")
    alive, applied = _reports(config, wanted)
    setup = (read_seconds(folder / run_folder.SECONDS) or Seconds()).setup
    now = setup + alive[-1].seconds
    learner = _learner(lines[wanted - 1])
    return state(
        Plan(config.run.id, config.learner.versions),
        RunObservation(
            {LEARNER: ServiceObservation(StatusReply(now, learner)), alive[-1].worker: _worker(alive, setup)},
            accumulate(lines[:wanted]),
            tuple(applied),
        ),
        now=now,
        started=0.0,
    )


def _reports(config: RunConfig, version: int) -> tuple[list[WorkerAlive], list[VersionApplied]]:
    """What one worker reported up to its first report after it applied the version."""
    alive: dict[str, list[WorkerAlive]] = {}
    applied: dict[str, list[VersionApplied]] = {}
    with closing(open_existing_bus(config)) as bus:
        for record in read_existing(bus, WORKERS):
            match message_in(record):
                case VersionApplied() as update:
                    applied.setdefault(update.worker, []).append(update)
                case WorkerAlive() as report:
                    alive.setdefault(report.worker, []).append(report)
                    if report.version >= version:
                        return alive[report.worker], applied.get(report.worker, [])
    raise UserError(f"{config.run.id}: no worker reported after it applied version {version}")


def _learner(line: Line) -> dict[str, object]:
    """The learner's status while it trains the batch after this line's.

    Of the trajectories that were pending when the line was written, those of the next batch are being trained, and the
    others wait: a worker with room for all of them samples what is offered at once.
    """
    ledger = line["trajectories"]
    waiting = max(0, ledger["pending"] - line["batch"])
    return {"version": line["published"], "trajectories": ledger, "waiting_trajectories": waiting}


def _worker(reports: Sequence[WorkerAlive], setup: float) -> ServiceObservation:
    last = reports[-1]
    earlier = next((r for r in reversed(reports) if last.seconds - r.seconds >= RATE_S), reports[0])
    return ServiceObservation(_answer(last, setup), _answer(earlier, setup) if earlier is not last else None)


def _answer(report: WorkerAlive, setup: float) -> StatusReply:
    status = {"version": report.version, "live": report.live, "sampled_tokens": report.sampled_tokens}
    return StatusReply(setup + report.seconds, {**status, "seconds": report.seconds})


def draw(shown: State) -> str:
    """The view as an SVG that loads nothing."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(view(shown, width=COLUMNS, height=ROWS))
    drawn = WEB_FONT.sub("", console.export_svg(title="make run"))
    return drawn.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def photograph(browser: str, page: Path, picture: Path) -> None:
    """The top of the page as a PNG. Raises UserError when there is no page, or the browser makes none of it."""
    if not page.is_file():
        raise UserError(f"{page}: no such report; `palimpsest report {page.parent}` makes it")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=15000"]
        done = subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", f"--window-size={WINDOW}",
             f"--screenshot={picture.resolve()}", page.resolve().as_uri()],
            capture_output=True, text=True, check=False, timeout=BROWSER_LIMIT_S,
        )  # fmt: skip
    if done.returncode or not picture.is_file():
        raise UserError(f"{browser} made no picture of {page}: {done.stderr[-400:]}", ExitCode.UNAVAILABLE)


if __name__ == "__main__":
    program.main(main)
