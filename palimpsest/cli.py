"""`palimpsest COMMAND ...`: finds the command and runs it. Each command's code is imported when it is asked for.

Nothing but the standard library is imported before `main` runs, so that --help is instant and Ctrl-C during an import
ends the program like any other Ctrl-C.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import palimpsest

Command = Callable[[Sequence[str]], None]
INTERRUPTED, NO_READER = 130, 141
"""user_error.ExitCode.INTERRUPTED; and what a shell gives a program that SIGPIPE has ended."""
CHECK = """\
usage: palimpsest check RUN.toml [--SECTION.KEY=VALUE ...]

Print the run with every default filled in."""
REPORT = """\
usage: palimpsest report FOLDER

Make summary.json and report.html again, also while the run goes on.

  FOLDER    the run's folder (runs/ID)"""


def run(arguments: Sequence[str]) -> None:
    """Train: everything on this machine."""
    from palimpsest.run import command

    command(arguments)


def check(arguments: Sequence[str]) -> None:
    """Print a run's configuration with every default filled in."""
    if _answered(CHECK, arguments):
        return
    from palimpsest.common.config import load
    from palimpsest.common.config.to_toml import to_toml

    print(to_toml(load([*arguments, "--check"], os.environ, program="palimpsest check").config).rstrip("\n"))


def report(arguments: Sequence[str]) -> None:
    """Make a run's summary and report again."""
    if _answered(REPORT, arguments):
        return
    from palimpsest.common.user_error import UserError
    from palimpsest.run import conclude
    from palimpsest.services.local import console_text

    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"palimpsest report {flags[0]}: there is no such flag\n{REPORT}")
    if len(arguments) > 1:
        raise UserError(f"one folder is wanted, but {' and '.join(arguments)} were given")
    folder = Path(arguments[0])
    print(console_text.format_result(conclude(folder), folder))


def audit(arguments: Sequence[str]) -> None:
    """Count a run anew; exits with 1 if anything disagrees."""
    from palimpsest.services.audit.command import run_command

    answered = run_command(arguments, os.environ)
    print(answered.text)
    sys.exit(answered.code)


def dead_letters(arguments: Sequence[str]) -> None:
    """List or replay the records that could not be used."""
    from palimpsest.services.learner.dead_letters.command import run_command

    for line in run_command(arguments, os.environ):
        print(line, flush=True)


def rescore(arguments: Sequence[str]) -> None:
    """Compare a recorded run's old log-probs with plain transformers."""
    from palimpsest.rescore_command import command

    command(arguments)


def export(arguments: Sequence[str]) -> None:
    """Write a version as a Hugging Face model folder."""
    from palimpsest.export.command import run_command

    for line in run_command(arguments, os.environ):
        print(line, flush=True)


def doctor(arguments: Sequence[str]) -> None:
    """Examine this machine; exits with 3 if a run cannot begin."""
    from palimpsest.doctor.__main__ import main as examine

    sys.exit(examine(arguments))


def env(arguments: Sequence[str]) -> None:
    """List the environments, or show one task of one."""
    from palimpsest.env_command import command

    command(arguments)


COMMANDS: dict[str, tuple[Command, str]] = {
    "run": (run, "train: everything on this machine, in processes of its own"),
    "check": (check, "print a run's configuration with every default filled in"),
    "report": (report, "make a run's summary and report again"),
    "export": (export, "write a run's trained model as a Hugging Face folder"),
    "audit": (audit, "count a run anew from all it has left and print what disagrees"),
    "dead-letters": (dead_letters, "list or replay the records that could not be used"),
    "rescore": (rescore, "compare a recorded run's old log-probs with plain transformers"),
    "doctor": (doctor, "examine this machine: every check, what it means, what to do"),
    "env": (env, "list the environments, or show one task of one"),
}


def usage() -> str:
    """What `palimpsest --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    end = "palimpsest COMMAND --help prints more; palimpsest --version prints the version."
    return "\n".join(["usage: palimpsest COMMAND ...", "", *lines, "", end])


def dispatch() -> None:
    """Run the command that the command line names. Raises UserError."""
    match sys.argv[1:]:
        case ["--help" | "-h", *_]:
            print(usage())
        case ["--version", *_]:
            print(f"palimpsest {palimpsest.__version__}")
        case [name, *arguments] if name in COMMANDS:
            COMMANDS[name][0](arguments)
        case []:
            from palimpsest.common.user_error import UserError

            raise UserError(usage())
        case [name, *_]:
            import difflib

            from palimpsest.common.user_error import UserError

            near = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f"did you mean `palimpsest {near[0]}`?" if near else f"there are {', '.join(COMMANDS)}"
            what = "flag" if name.startswith("-") else "command"
            raise UserError(f"palimpsest {name}: there is no such {what}; {meant}")


def main() -> None:
    """The console command; exits the process with a code of docs/operations.md."""
    try:
        try:
            if {"--help", "-h", "--version"} & set(sys.argv[1:2]):
                dispatch()
                return
            from palimpsest.common import program

            program.main(dispatch)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(NO_READER)


def _answered(text: str, arguments: Sequence[str]) -> bool:
    """Whether help was asked for, and printed. Raises UserError with the same text where there is no argument."""
    if {"--help", "-h"} & set(arguments):
        print(text)
        return True
    if not arguments:
        from palimpsest.common.user_error import UserError

        raise UserError(text)
    return False


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that is read no longer: `palimpsest ... | head`."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
