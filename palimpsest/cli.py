"""The console command `palimpsest COMMAND ...`. Imports the code of a command only when that command runs.

This module imports only the standard library, so --help is instant and Ctrl-C works during later imports.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import palimpsest

Command = Callable[[Sequence[str]], None]
INTERRUPTED, NO_READER = 130, 141
"""Exit codes: user_error.ExitCode.INTERRUPTED, and 128 + SIGPIPE as shells report it."""
CHECK = """\
usage: palimpsest check RUN.toml [--SECTION.KEY=VALUE ...]

Print the run with every default filled in."""
REPORT = """\
usage: palimpsest report FOLDER

Write summary.json and report.html from the run's history. Works while the run is running.

  FOLDER    the run's folder (runs/ID)"""


def run(arguments: Sequence[str]) -> None:
    """Train on this machine."""
    from palimpsest.run import command

    command(arguments)


def check(arguments: Sequence[str]) -> None:
    """Print a run's configuration with every default filled in."""
    if _answered(CHECK, arguments):
        return
    from palimpsest.common.config import load
    from palimpsest.common.model_limits import refuse_limits
    from palimpsest.common.trajectory_limit import resolved_toml

    config = load(["--check", *arguments], os.environ, program="palimpsest check").config
    refuse_limits(config)
    print(resolved_toml(config).rstrip("\n"))


def report(arguments: Sequence[str]) -> None:
    """Rewrite the summary and the report of a run."""
    if _answered(REPORT, arguments):
        return
    from palimpsest.common.user_error import UserError
    from palimpsest.run import conclude
    from palimpsest.services.local import console_text

    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"palimpsest report {flags[0]}: there is no such flag\n{REPORT}")
    if len(arguments) > 1:
        raise UserError(f"palimpsest report takes one folder, not {len(arguments)}: {' '.join(arguments)}")
    folder = Path(arguments[0])
    print(console_text.format_result(conclude(folder), folder))


def audit(arguments: Sequence[str]) -> None:
    """Recompute the counts of a run from its stored data. Exits with 1 if a value disagrees."""
    from palimpsest.services.audit.command import run_command

    answered = run_command(arguments, os.environ)
    print(answered.text)
    sys.exit(answered.code)


def dead_letters(arguments: Sequence[str]) -> None:
    """List or replay dead letters."""
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


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate a version or a model on held-out tasks."""
    from palimpsest.eval_command import command

    command(arguments)


def doctor(arguments: Sequence[str]) -> None:
    """Check this machine. Exits with 3 if a run cannot start."""
    from palimpsest.doctor.__main__ import main as examine

    sys.exit(examine(arguments))


def plan(arguments: Sequence[str]) -> None:
    """Print the memory that a run needs on each GPU. Exits with 1 if it does not fit."""
    from palimpsest.plan.command import run_command

    text, code = run_command(arguments)
    print(text)
    sys.exit(code)


def env(arguments: Sequence[str]) -> None:
    """List the environments, or show a task."""
    from palimpsest.env_command import command

    command(arguments)


def token(arguments: Sequence[str]) -> None:
    """Make a token for the HTTP services."""
    from palimpsest.token_command import command

    command(arguments)


def acls(arguments: Sequence[str]) -> None:
    """Print the commands that give each role its rights on Kafka."""
    from palimpsest.acls_command import command

    command(arguments)


def store(arguments: Sequence[str]) -> None:
    """List, show, check, export and import the stored versions of a run."""
    from palimpsest.store_command import store as command

    command(arguments)


def pin(arguments: Sequence[str]) -> None:
    """Keep a version of a running run, or release it."""
    from palimpsest.store_command import pin as command

    command(arguments)


def control(name: str) -> Command:
    """Return the command that shows or changes a running run."""

    def call(arguments: Sequence[str]) -> None:
        from palimpsest.control_command import command

        command(name, arguments)

    return call


CONTROL = {
    "status": "show what a running run does",
    "watch": "show it every two seconds",
    "get": "show the settings that may change while a run is running",
    "set": "change settings of a running run",
    "pause": "train no further version, or offer no further task",
    "resume": "end every pause",
    "checkpoint": "save a checkpoint now",
    "cut": "cut all live generations now and score their tokens",
    "drain": "let a worker or the gateway finish what it has, and end it",
    "stop": "save a checkpoint and end a running run",
    "changes": "list who changed what in a running run",
}
COMMANDS: dict[str, tuple[Command, str]] = {
    "run": (run, "train a model on this machine"),
    "check": (check, "print a run's configuration with every default filled in"),
    "report": (report, "rewrite the summary and the report of a run"),
    "export": (export, "write the trained model of a run as a Hugging Face folder"),
    "eval": (evaluate, "evaluate a stored version or a model folder on held-out tasks"),
    "audit": (audit, "recompute the counts of a run from its stored data and print every disagreement"),
    "dead-letters": (dead_letters, "list or replay the records that could not be used"),
    "rescore": (rescore, "compare a recorded run's old log-probs with plain transformers"),
    "store": (store, "list, show, check, export and import the stored versions of a run"),
    "pin": (pin, "keep a version of a running run, or release it"),
    "doctor": (doctor, "check this machine: print every result, its meaning and the remedy"),
    "plan": (plan, "print the memory that a run needs on each GPU, and the keys that change it"),
    "token": (token, "make a token for the HTTP services, and its line for the tokens file"),
    "acls": (acls, "print the commands that give each role its rights on Kafka"),
    "env": (env, "list the environments, or show a task of an environment"),
    **{name: (control(name), text) for name, text in CONTROL.items()},
}


def usage() -> str:
    """Return the text of `palimpsest --help`."""
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
            meant = f"did you mean `palimpsest {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}"
            what = "flag" if name.startswith("-") else "command"
            raise UserError(f"palimpsest {name}: there is no such {what}; {meant}")


def main() -> None:
    """Run the console command. Exits with a code of docs/operations.md."""
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
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes standard output at exit
        sys.exit(NO_READER)


def _answered(text: str, arguments: Sequence[str]) -> bool:
    """Print `text` for --help and return whether it was printed. Raises UserError(text) without arguments."""
    if {"--help", "-h"} & set(arguments):
        print(text)
        return True
    if not arguments:
        from palimpsest.common.user_error import UserError

        raise UserError(text)
    return False


def _reader_is_gone() -> bool:
    """Return whether the reader of standard output closed the pipe, as in `palimpsest ... | head`."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
