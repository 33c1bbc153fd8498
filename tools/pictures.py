"""Draws the pictures of the README from a recorded run: docs/pictures/view.svg and docs/pictures/report.png.

python -m tools.pictures RUN_FOLDER [--folder docs/pictures] [--version N]

view.svg shows the live view when version N (default: the middle of the run) was the newest. The code of the live view
draws it from the history of the run and the records of its workers. The snapshot store and the gateway write no status
to the log, so the view omits their rows. report.png is the top of report.html in a headless Chromium. Without Chromium
the file stays unchanged.
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
from palimpsest.services.report.folder import Seconds, history, read_run_config, read_seconds
from palimpsest.services.report.history_line import Line

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 108, 40
WINDOW = "1200,1420"
"""Pixels of report.png: tiles, curves, and the figure of discrepancy and staleness ratio."""
RATE_S = 10.0
"""Interval in seconds for the rate of sampling, as in the live view."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_LIMIT_S = 300.0
WEB_FONT = re.compile(r"@font-face \{[^}]*\}\s*")


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, runs/ID")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--version", type=int, default=None)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "view.svg").write_text(draw(state_at(options.run, options.version)))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"report.png is unchanged: none of {', '.join(BROWSERS)} is installed")
    photograph(browser, options.run / run_folder.REPORT, options.folder / "report.png")


def state_at(folder: Path, version: int | None = None) -> State:
    """Return the state of the run at the first report of a worker after it applied `version`.

    Raises UserError if the folder belongs to no run, or the run has not reached the version.
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
    """Return the records of a worker up to its first report after it applied the version."""
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
    """Return the status of the learner while it trains the batch after this line.

    The pending trajectories of this line are either in the next batch or wait: a worker with a free slot starts an
    offered trajectory immediately.
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
    """Return the view as an SVG without external resources."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(view(shown, width=COLUMNS, height=ROWS))
    drawn = WEB_FONT.sub("", console.export_svg(title="make run"))
    return drawn.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def photograph(browser: str, page: Path, picture: Path) -> None:
    """Write the top of the page as a PNG. Raises UserError if the page is missing or the browser fails."""
    if not page.is_file():
        raise UserError(f"{page}: no such report; `palimpsest report {page.parent}` writes it")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=15000"]
        done = subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", f"--window-size={WINDOW}",
             f"--screenshot={picture.resolve()}", page.resolve().as_uri()],
            capture_output=True, text=True, check=False, timeout=BROWSER_LIMIT_S,
        )  # fmt: skip
    if done.returncode or not picture.is_file():
        raise UserError(f"{browser} wrote no picture of {page}: {done.stderr[-400:]}", ExitCode.UNAVAILABLE)


if __name__ == "__main__":
    program.main(main)
