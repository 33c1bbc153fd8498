"""Runs the programs that download and build, and shows their progress."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.user_error import ExitCode, UserError

Progress = Callable[[Sequence[str], float], None]
"""Called every few seconds with the output of the program so far and the elapsed seconds."""
SHOWN_EVERY_S = 10.0
LAST_LINES = 12


def program(name: str, why: str, package: str) -> str:
    """Return the path of a program. Raises UserError if it is not on the PATH."""
    if (path := shutil.which(name)) is None:
        raise UserError(f"{why} needs `{name}`, which is not on the PATH: install {package}", ExitCode.UNAVAILABLE)
    return path


def run(
    command: Sequence[str],
    failure: str,
    settings: Mapping[str, str],
    progress: Progress,
    *,
    folder: Path | None = None,
) -> None:
    """Run a command and show its progress. The command ends with this process. Raises UserError if it fails."""
    parent = os.getpid()
    started = shown = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **settings},
            cwd=folder,
            preexec_fn=lambda: die_with_parent(parent),
        ) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=0.5)
                    if time.monotonic() - shown > SHOWN_EVERY_S:
                        shown = time.monotonic()
                        progress(_lines(output), shown - started)
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            tail = "\n  ".join(_lines(output)[-LAST_LINES:])
            raise UserError(
                f"{failure}:\n  {tail}\nfix this and repeat the command; finished downloads are kept",
                ExitCode.UNAVAILABLE,
            )


def _lines(output: IO[str]) -> list[str]:
    """Return the lines of the output so far, without color codes and empty lines."""
    output.seek(0)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.read())
    return [line for line in plain.splitlines() if line.removeprefix("[ERROR]").strip()]
