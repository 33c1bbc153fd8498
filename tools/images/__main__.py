"""Build the image of the gateway and the store without Docker."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache
from tools.images import debian, light


def main(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("light", help="write an archive for `docker load`, `podman load` or `skopeo copy`")
    command.add_argument("archive", type=Path, help="file to write, for example palimpsest-light.tar")
    command.add_argument("--refresh", action="store_true", help="download Debian's packages again, with their fixes")
    options = parser.parse_args(words)
    try:
        if options.refresh:
            shutil.rmtree(cache.folder() / debian.BASE_NAME, ignore_errors=True)
        light.build(options.archive.absolute())
    except UserError as error:
        print(f"images: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"images: {error}; name a file in a writable folder", file=sys.stderr)
        return ExitCode.UNAVAILABLE
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
