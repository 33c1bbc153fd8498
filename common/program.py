"""How every service's `__main__` begins and ends: read the run, set up logs and signals, turn errors into exits."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator

from palimpsest.common import failpoints, logs, run_folder
from palimpsest.common.bus.port import OffsetGone
from palimpsest.common.config import Invocation, load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.file_errors import file_errors_as_user_errors, usable_folder
from palimpsest.common.files import write
from palimpsest.common.service import Stop
from palimpsest.common.user_error import ExitCode, UserError

NO_FOLDER = ("env_gateway", "snapshot_store")
"""Services that keep nothing in the run's folder, or not necessarily."""


def service(name: str, body: Callable[[Invocation, Stop], None]) -> None:
    """Run a service's body with its run and a Stop; exits the process (docs/operations.md, "exit codes")."""

    def begin() -> None:
        invocation = load(sys.argv[1:], os.environ, program=f"python -m palimpsest.services.{name}")
        if invocation.check:
            print(to_toml(invocation.config), end="")
            return
        if not invocation.config.run.id:
            raise UserError(
                "run.id is empty: services started by hand need the same one each, for example --run.id=first "
                "(`palimpsest run` makes one)"
            )
        config, stop = invocation.config, Stop().install()
        logs.configure(name, config.logs.level, config.logs.format)
        try:
            with file_errors_as_user_errors(), gap_as_user_error():
                if name not in NO_FOLDER:
                    usable_folder(config.run.home, key="run.folder")
                failpoints.reach(f"{name}.start")
                body(invocation, stop)
        except UserError as refusal:
            # for the supervisor: a launcher in between (torchrun) would swallow the sentence and its code. It looks for
            # its own child among the processes: a replaced learner leaves its sentence in the same place
            named = {"rollout": config.rollout.worker, "learner.replica": config.replica.name}
            process = named.get(name, name)
            processes = [os.getpid(), os.getppid()]
            said = json.dumps({"message": str(refusal), "code": int(refusal.code), "processes": processes})
            with contextlib.suppress(OSError):  # a folder that cannot be written must not hide the sentence
                write(run_folder.refusal_file(config.run.home, process), said.encode())
            raise
        if stop.signaled:
            sys.exit(int(ExitCode.INTERRUPTED))

    main(begin)


def main(program: Callable[[], None]) -> None:
    """Run a program: a UserError, or a file it cannot use, becomes a sentence and an exit code; all else a
    traceback."""
    try:
        with file_errors_as_user_errors():
            program()
    except UserError as refusal:
        with contextlib.suppress(OSError):  # where the sentence goes may be on the full disk, too
            print(refusal, file=sys.stderr)
        sys.exit(int(refusal.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))


def print_line(text: str) -> None:
    """Print it at once. A reader that has read enough (`| head`) ends the program, without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def gap_as_user_error() -> Iterator[None]:
    """A UserError in place of the error of a reader whose next record is gone."""
    try:
        yield
    except OffsetGone as gone:
        raise UserError(
            f"the log no longer holds what comes next: {gone}. Records would be lost silently, so the program stops "
            f"here: restore the log, or start a new run; what is kept how long: bus.retention_hours",
            ExitCode.DAMAGED,
        ) from None
