"""How every service's `__main__` begins and ends: read the run, set up logs and signals, turn errors into exits."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator

from common import logs
from common.bus.port import OffsetGone
from common.config import Invocation, load
from common.config.show import show
from common.files import FULL, write
from common.refusal import ExitCode, Refusal
from common.service import Stop


def service(name: str, body: Callable[[Invocation, Stop], None]) -> None:
    """Run a service's body with its run and a Stop; exits the process (docs/operations.md, "exit codes")."""

    def begin() -> None:
        invocation = load(sys.argv[1:], os.environ, program=f"python -m services.{name}")
        if invocation.check:
            print(show(invocation.config), end="")
            return
        if not invocation.config.run.id:
            raise Refusal(
                "run.id is empty: services started by hand need the same one each, for example --run.id=first "
                "(`python -m services` makes one)"
            )
        config = invocation.config
        logs.configure(name, config.logs.level, config.logs.format)
        try:
            with full_disk_refused(), gap_refused():
                body(invocation, Stop().install())
        except Refusal as refusal:
            # for the supervisor: a launcher in between (torchrun) would swallow the sentence and its code. It looks for
            # its own child among the processes: a replaced learner leaves its sentence in the same place
            named = {"rollout": config.rollout.worker, "learner.replica": config.replica.name}
            process = named.get(name, name)
            processes = [os.getpid(), os.getppid()]
            said = json.dumps({"message": str(refusal), "code": int(refusal.code), "processes": processes})
            with contextlib.suppress(OSError):  # a folder that cannot be written must not hide the sentence
                write(config.run.home / "refusals" / f"{process}.json", said.encode())
            raise

    main(begin)


def main(program: Callable[[], None]) -> None:
    """Run a program: a Refusal or a full disk becomes a sentence and an exit code, anything else a traceback."""
    try:
        with full_disk_refused():
            program()
    except Refusal as refusal:
        with contextlib.suppress(OSError):  # where the sentence goes may be on the full disk, too
            print(refusal, file=sys.stderr)
        sys.exit(int(refusal.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))


def tell(text: str) -> None:
    """Print it at once. A reader that has read enough (`| head`) ends the program, without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def full_disk_refused() -> Iterator[None]:
    """A Refusal in place of the error that a full disk raises in this block."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        what, mend = FULL[error.errno]
        where = f" (writing {error.filename})" if error.filename else ""
        raise Refusal(
            f"{what}{where}: {mend} and start again; a run goes on from its last checkpoint",
            ExitCode.UNAVAILABLE,
        ) from None


@contextlib.contextmanager
def gap_refused() -> Iterator[None]:
    """A Refusal in place of the error of a reader whose next record is gone."""
    try:
        yield
    except OffsetGone as gone:
        raise Refusal(
            f"the log no longer holds what comes next: {gone}. Records would be lost silently, so the program stops "
            f"here: restore the log, or start a new run; what is kept how long: bus.retention_hours",
            ExitCode.DAMAGED,
        ) from None
