"""`palimpsest COMMAND ...`: finds the command and runs it. Each command's code is imported when it is asked for."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from palimpsest.common import program
from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.program import print_line
from palimpsest.common.user_error import UserError

Command = Callable[[Sequence[str]], None]


def run(arguments: Sequence[str]) -> None:
    """Train: everything on this machine."""
    from palimpsest.run import command

    command(arguments)


def check(arguments: Sequence[str]) -> None:
    """Print a run's configuration with every default filled in."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print_line(
            "usage: palimpsest check RUN.toml [--SECTION.KEY=VALUE ...]\n\nPrint the run with every default filled in."
        )
        return
    print_line(to_toml(load([*arguments, "--check"], os.environ, program="palimpsest check").config).rstrip("\n"))


def report(arguments: Sequence[str]) -> None:
    """Make a run's summary and report again."""
    from palimpsest.run import conclude
    from palimpsest.services.local import console_text

    match arguments:
        case [folder] if not folder.startswith("-"):
            print_line(console_text.format_result(conclude(Path(folder)), Path(folder)))
        case _:
            print_line(
                "usage: palimpsest report FOLDER\n\nMake summary.json and report.html again, also while it goes on."
            )


def audit(arguments: Sequence[str]) -> None:
    """Count a run anew; exits with 1 if anything disagrees."""
    from palimpsest.services.audit.command import run_command

    answered = run_command(arguments, os.environ)
    print_line(answered.text)
    sys.exit(answered.code)


def dead_letters(arguments: Sequence[str]) -> None:
    """List or replay the records that could not be used."""
    from palimpsest.services.learner.dead_letters.command import run_command

    for line in run_command(arguments, os.environ):
        print_line(line)


def rescore(arguments: Sequence[str]) -> None:
    """Compare a recorded run's old log-probs with plain transformers."""
    from palimpsest.rescore import command

    command(arguments)


def doctor(arguments: Sequence[str]) -> None:
    """Examine this machine; exits with 3 if a run cannot begin."""
    from palimpsest.doctor.__main__ import main as examine

    sys.exit(examine(arguments))


COMMANDS: dict[str, tuple[Command, str]] = {
    "run": (run, "train: everything on this machine, in processes of its own"),
    "check": (check, "print a run's configuration with every default filled in"),
    "report": (report, "make a run's summary and report again"),
    "audit": (audit, "count a run anew from all it has left and print what disagrees"),
    "dead-letters": (dead_letters, "list or replay the records that could not be used"),
    "rescore": (rescore, "compare a recorded run's old log-probs with plain transformers"),
    "doctor": (doctor, "examine this machine: every check, what it means, what to do"),
}


def usage() -> str:
    """What `palimpsest --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: palimpsest COMMAND ...", "", *lines, "", "palimpsest COMMAND --help prints more."])


def dispatch() -> None:
    """Run the command that the command line names. Raises UserError."""
    match sys.argv[1:]:
        case [] | ["--help" | "-h", *_]:
            print_line(usage())
        case [name, *arguments] if name in COMMANDS:
            COMMANDS[name][0](arguments)
        case [name, *_]:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f"did you mean `palimpsest {near[0]}`?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"palimpsest {name}: there is no such command; {meant}")


def main() -> None:
    """The console command; exits the process."""
    program.main(dispatch)
