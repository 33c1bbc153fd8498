"""How every service's `__main__` begins and ends: read the run, set up logs and signals, turn errors into exits."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable

from common import logs
from common.config import Invocation, load
from common.config.show import show
from common.files import write
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
            body(invocation, Stop().install())
        except Refusal as refusal:
            # for the supervisor: a launcher in between (torchrun) would swallow the sentence and its code
            process = config.rollout.worker if name == "rollout" else name
            said = json.dumps({"message": str(refusal), "code": int(refusal.code)})
            with contextlib.suppress(OSError):  # a folder that cannot be written must not hide the sentence
                write(config.run.home / "refusals" / f"{process}.json", said.encode())
            raise

    main(begin)


def main(program: Callable[[], None]) -> None:
    """Run a program: a Refusal or a full disk becomes a sentence and an exit code, anything else a traceback."""
    try:
        program()
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(int(refusal.code))
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        print(
            f"the disk is full{where}: free some space and start again with --resume; the run goes on from its "
            f"last checkpoint",
            file=sys.stderr,
        )
        sys.exit(int(ExitCode.UNAVAILABLE))
