"""Start and stop a Kafka and a MinIO of this machine, to try a cluster's run without a cluster."""

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
    """Obey the words; returns the exit code."""
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pair = DevStack(options.folder.absolute(), _say)
    try:
        match options.command:
            case "up":
                _tell(pair, pair.up(options.kafka_port, options.minio_port))
            case "down":
                pair.down()
            case _:
                return ExitCode.DONE if pair.status() else ExitCode.UNAVAILABLE
    except UserError as refusal:
        print(f"backends: {refusal}", file=sys.stderr)
        return refusal.code
    except OSError as error:
        print(
            f"backends: {error}; name a folder that can be written to (make {options.command} FOLDER=...)",
            file=sys.stderr,
        )
        return ExitCode.UNAVAILABLE
    except KeyboardInterrupt:
        print("\nbackends: interrupted; what runs goes on until `down`, the next `up` does the rest", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.backends", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="get what is missing, start both, print addresses and credentials")
    down = commands.add_parser("down", help="stop what `up` started; data stays")
    status = commands.add_parser("status", help="say which of the two runs; exit code 0 if both do")
    for command in (up, down, status):
        command.add_argument(
            "folder", nargs="?", type=Path, default=FOLDER, help="data and logs (default: %(default)s)"
        )
    up.add_argument("--kafka-port", type=_port, help="default: the one it had, else 9092, else a free one")
    up.add_argument("--minio-port", type=_port, help="default: the one it had, else 9000, else a free one")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port (1 to 65535)")
    return int(text)


def _tell(pair: DevStack, settings: dict[str, str]) -> None:
    folder = shlex.quote(_short(pair.folder))
    _print("\n  ".join(["", *exports(settings)]))
    _print(f"\nThese lines are in {folder}/environment. In the shell of a run: . {folder}/environment")
    _print(f"To stop both: make down{'' if pair.folder == FOLDER else f' FOLDER={folder}'}")


def _short(folder: Path) -> str:
    """The folder as seen from here, if it is below."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _say(text: str) -> None:
    _print(f"backends: {text}")


def _print(text: str) -> None:
    """Print; without a reader (`make up | head`) the work goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
