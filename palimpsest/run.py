"""`palimpsest run`: starts and supervises all processes of a run on one machine."""

import contextlib
import datetime
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from palimpsest.common import run_folder
from palimpsest.common.bus.port import Bus
from palimpsest.common.config import Invocation, load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.credentials import service_token
from palimpsest.common.file_errors import file_errors_as_user_errors
from palimpsest.common.model_limits import refuse_limits
from palimpsest.common.model_path import refuse_no_model, refuse_no_tokenizer
from palimpsest.common.service import Stop
from palimpsest.common.trajectory_limit import resolved_toml
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.live.poller import RunObservation, RunPoller
from palimpsest.services.live.screen import Screen
from palimpsest.services.live.state import Plan, State, ready_at, state
from palimpsest.services.live.stopwatch import Stopwatch
from palimpsest.services.local import console_text
from palimpsest.services.local.bus_opening import open_run_bus
from palimpsest.services.local.run_setup import PreparedRun, prepare_run, resolve, restore
from palimpsest.services.local.supervisor import Supervisor, assign_ports
from palimpsest.services.report.folder import contents, newest_checkpoint


def command(arguments: Sequence[str]) -> None:
    """Start or resume a run. Raises UserError."""
    if not arguments:
        raise UserError(console_text.USAGE)
    if {"--help", "-h"} & set(arguments):
        print(console_text.USAGE)
        return
    launch(load(arguments, os.environ, program="palimpsest run"))


def launch(invocation: Invocation) -> None:
    """Start or resume the run. Returns when it is done; exits with 130 if it is stopped."""
    if invocation.check:
        config = resolve(invocation)
        refuse_limits(config)
        print(resolved_toml(config), end="")
        return
    refuse_no_model(invocation.config.model.path)
    refuse_no_tokenizer(invocation.config.model.path)
    refuse_limits(invocation.config)
    stop = Stop().install()
    settled = prepare_run(invocation, now=datetime.datetime.now(datetime.UTC).astimezone())
    with settled.lock as lock:
        if lock.warning:
            print(lock.warning, file=sys.stderr)
        run(invocation, settled, stop)


def run(invocation: Invocation, settled: PreparedRun, stop: Stop) -> None:
    """Run the prepared run, from the first process to the report. Exits with 130 or 7 if it is stopped."""
    config, flags = assign_ports(settled.config)
    local = Supervisor(config, settled.saved, flags)
    home = config.run.home
    again = console_text.resume(
        home,
        invocation.source,
        invocation.overrides,
        kafka=config.bus.kind == "kafka",
        by_make="MAKELEVEL" in os.environ,
        program=program(),
    )
    stop.last_words = f"{console_text.ENDED}\n{again}\n"
    print(
        console_text.format_start(config, {**local.urls, **local.replica_urls}, resumed=invocation.resume is not None),
        flush=True,
    )
    bus = None
    checkpoint = newest_checkpoint(config.checkpoint_folder)
    try:
        with file_errors_as_user_errors():
            bus = open_run_bus(config, stop, say=lambda line: print(line, flush=True))
            done = bus is not None and supervise(config, local, stop, bus)
    except UserError as error:
        if bus is not None:
            with contextlib.suppress(
                OSError, UserError
            ):  # raise the error that ended the run, even if the report fails too
                conclude(home)
        if error.code == ExitCode.CONFIGURATION and newest_checkpoint(config.checkpoint_folder) == checkpoint:
            with contextlib.suppress(OSError):
                restore(settled)
        raise UserError(f"{error}\nAfter fixing this, resume with:\n{again}", error.code) from None
    if bus is None:  # the summary would wait for the same log
        print(f"{console_text.STOPPED_BEFORE}\n{again}")
        sys.exit(int(ExitCode.INTERRUPTED))
    if done:
        finish(config)
        return
    try:
        summary = conclude(home)
    except UserError as error:
        print(f"{console_text.STOPPED}\n{again}\nThere is no report: {error}")  # the command to resume matters most
        sys.exit(int(ExitCode.INTERRUPTED))
    print(f"{console_text.format_stop(summary)}\n{again}\n{console_text.format_result(summary, home)}")
    if summary["versions"]:
        print(f"model: the run is not finished; export its newest version with:\n{export_command(home)}")
    sys.exit(int(ExitCode.STOPPED if local.is_stopped_over_rest else ExitCode.INTERRUPTED))


def finish(config: RunConfig) -> None:
    """Write the report of a finished run, export its model, and print both. Raises UserError.

    Without a report, for example because the history is damaged, the model is exported, too.
    """
    home = config.run.home
    try:
        with file_errors_as_user_errors():
            print(console_text.format_result(conclude(home), home), flush=True)
    except UserError as error:
        print(export_last(config), flush=True)
        raise UserError(
            f"The run is done, but there is no report: {error}\nAfter fixing this, write it with:\n"
            f"{console_text.report_command(home, program=program())}",
            error.code,
        ) from None
    print(export_last(config))


def export_last(config: RunConfig) -> str:
    """Export the last version of a finished run. Returns the line to print. Raises UserError."""
    home = config.run.home
    if not config.run.export:
        return f"model: not exported (run.export is off); export it with:\n{export_command(home)}"
    from palimpsest.export.export import export

    try:
        with file_errors_as_user_errors():
            done = export(config, home, home / console_text.MODEL, overwrite=True)
    except UserError as error:
        raise UserError(
            f"The run is done, but its model was not exported: {error}\nAfter fixing this, export it with:\n"
            f"{export_command(home)}",
            error.code,
        ) from None
    return f"model: {done.folder} (version {done.version})"


def export_command(home: Path) -> str:
    """Return the shell command that exports the newest version of the run."""
    return console_text.export_command(home, overwrite=(home / console_text.MODEL).exists(), program=program())


def program() -> str:
    """Return the shell command that calls this `palimpsest`."""
    return console_text.called(Path(sys.argv[0]), Path(sys.executable), Path.cwd(), on_path=on_path())


def on_path() -> Path | None:
    """Return the `palimpsest` on the PATH, or None."""
    found = shutil.which("palimpsest")
    return Path(found) if found else None


def supervise(config: RunConfig, local: Supervisor, stop: Stop, bus: Bus) -> bool:
    """Run the processes and show their state. Returns whether the run is done. Raises UserError on failure."""
    started = time.monotonic()
    plan = Plan(config.run.id, config.learner.versions, replicas=frozenset(local.replica_urls))
    stopwatch = Stopwatch(config.run.home / run_folder.SECONDS, now=started)
    watch = RunPoller(
        {**local.urls, **local.replica_urls}, config.run.home, bus, run=config.run.id, token=service_token(os.environ)
    )

    def see() -> State:
        return state(
            plan,
            watch.observe(),
            now=time.monotonic(),
            started=started,
            crashes=local.crashes,
            starts_again_in=local.starts_again_in,
            stopping=stop.requested,
        )

    def look() -> RunObservation:
        sight = watch.observe()
        stopwatch.update(now=time.monotonic(), ready=ready_at(sight))
        stopwatch.keep()
        return sight

    try:
        with watch, Screen(Console(), see, stopping=lambda: stop.requested):
            return local.run(stop, look)
    finally:
        stopwatch.save()
        bus.close()


def conclude(folder: Path) -> dict[str, object]:
    """Write the summary and the report of a run folder. Returns the summary."""
    from palimpsest.services.report.summary import write_summary
    from palimpsest.services.report.write import write_report  # imports plotly, which takes a second

    held = contents(folder)
    summary = write_summary(held)
    write_report(held, summary)
    return summary
