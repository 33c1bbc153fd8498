"""Start and end of every service: load the configuration, set up logs and signals, convert errors to exit codes."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator

from palimpsest.common import failpoints, logs, run_folder
from palimpsest.common.bus.port import OffsetGone
from palimpsest.common.config import Invocation, load
from palimpsest.common.file_errors import file_errors_as_user_errors, usable_folder
from palimpsest.common.files import write
from palimpsest.common.instruments import report_build, report_free_bytes
from palimpsest.common.secret_variables import hide_secrets
from palimpsest.common.service import Stop
from palimpsest.common.termination_message import leave_message
from palimpsest.common.trajectory_limit import resolved_toml
from palimpsest.common.user_error import ExitCode, UserError

NO_FOLDER = ("env_gateway", "snapshot_store")
"""Services that do not need the run's folder. (The snapshot store needs it only for storage = "folder".)"""


def service(name: str, body: Callable[[Invocation, Stop], None]) -> None:
    """Run the body of a service with its configuration and a Stop.

    Exits the process (docs/operations.md, "exit codes").
    """

    def begin() -> None:
        invocation = load(sys.argv[1:], os.environ, program=f"python -m palimpsest.services.{name}")
        if invocation.check:
            print(resolved_toml(invocation.config), end="")
            return
        if not invocation.config.run.id:
            raise UserError(
                "run.id is empty: start all services of a run with the same id, for example --run.id=first "
                "(`palimpsest run` creates one)"
            )
        config, stop = invocation.config, Stop().install()
        logs.configure(name, config.logs.level, config.logs.format)
        try:
            with file_errors_as_user_errors(), gap_as_user_error():
                report_build(name)
                if name not in NO_FOLDER:
                    usable_folder(config.run.home, key="run.folder")
                    report_free_bytes("run", config.run.home)
                failpoints.reach(f"{name}.start")
                body(invocation, stop)
        except UserError as error:
            # The supervisor reads this file, because a launcher in between (torchrun) hides the error text.
            # `processes` lets it recognize its own child: a replaced learner writes to the same file.
            process = {"rollout": config.rollout.worker, "learner.replica": config.replica.name}.get(name, name)
            processes = [os.getpid(), os.getppid()]
            report = json.dumps({"message": str(error), "code": int(error.code), "processes": processes})
            with contextlib.suppress(OSError):  # a read-only folder must not hide the error
                write(run_folder.refusal_file(config.run.home, process), report.encode())
            raise
        if stop.requested:
            sys.exit(int(stop.code))

    main(begin)


def main(program: Callable[[], None]) -> None:
    """Run a program. A UserError or an unusable file prints its error text and sets the exit code; any other error
    prints a traceback."""
    hide_secrets()
    try:
        with file_errors_as_user_errors():
            program()
    except UserError as error:
        with contextlib.suppress(OSError):  # standard error may be a file on the full disk
            print(error, file=sys.stderr)
        leave_message(str(error))
        sys.exit(int(error.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))


def print_line(text: str) -> None:
    """Print a line and flush it. A closed pipe (`| head`) ends the program silently."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at exit
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def gap_as_user_error() -> Iterator[None]:
    """Convert OffsetGone, which a reader raises if its next record is not on the log, into a UserError."""
    try:
        yield
    except OffsetGone as error:
        raise UserError(
            f"the log no longer holds the next record: {error}. Reading on would skip records, so the program stops: "
            f"restore the log, or start a new run. bus.retention_hours sets the retention",
            ExitCode.DAMAGED,
        ) from None
