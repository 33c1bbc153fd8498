"""Start and stop Kafka and MinIO on this machine, for cluster runs without a cluster."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends.dev_stack import DevStack, exports

FOLDER = Path(__file__).resolve().parents[2] / "backends"


def main(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stack = DevStack(options.folder.absolute(), _say)
    try:
        match options.command:
            case "up":
                _print_settings(stack, stack.up(options.kafka_port, options.minio_port))
            case "down":
                stack.down()
            case _:
                return ExitCode.DONE if stack.status() else ExitCode.UNAVAILABLE
    except UserError as error:
        print(f"backends: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(
            f"backends: {error}; name a writable folder (make {options.command} FOLDER=...)",
            file=sys.stderr,
        )
        return ExitCode.UNAVAILABLE
    except KeyboardInterrupt:
        print("\nbackends: interrupted; started servers run until `down`, and `up` starts the others", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.backends", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser(
        "up", help="download missing programs, start both servers, print addresses and credentials"
    )
    down = commands.add_parser("down", help="stop the servers that `up` started; their data stays")
    status = commands.add_parser("status", help="print which servers run; exit code 0 if both run")
    for command in (up, down, status):
        command.add_argument(
            "folder", nargs="?", type=Path, default=FOLDER, help="data and logs (default: %(default)s)"
        )
    up.add_argument("--kafka-port", type=_port, help="default: the previous port, else 9092, else a free port")
    up.add_argument("--minio-port", type=_port, help="default: the previous port, else 9000, else a free port")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return int(text)


def _print_settings(stack: DevStack, settings: dict[str, str]) -> None:
    folder = shlex.quote(_short(stack.folder))
    _print("\n  ".join(["", *exports(settings)]))
    _print(f"\n{folder}/environment contains these lines. Load them in the shell of a run: . {folder}/environment")
    _print(f"To stop both: make down{'' if stack.folder == FOLDER else f' FOLDER={folder}'}")


def _short(folder: Path) -> str:
    """Return the folder, relative to the working directory if it is inside."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _say(text: str) -> None:
    _print(f"backends: {text}")


def _print(text: str) -> None:
    """Print the text. If the reader closed the pipe (`make up | head`), continue silently."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
