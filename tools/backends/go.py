"""Builds programs with Go from the module proxy. Each call fills a folder."""

import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache, commands
from tools.backends.cache import Say

OLDEST = (1, 21)
"""Some programs need a newer Go. Go 1.21 and later download it."""


def install(partial: Path, what: str, module: str, linker_flags: str, say: Say) -> None:
    """Build a program, named `module@version`, into the folder. Raises UserError."""
    _make(partial, what, ["install", "-v", "-trimpath", "-ldflags", linker_flags, module], None, say)


def build(partial: Path, what: str, source: Path, package: str, linker_flags: str, say: Say) -> None:
    """Build a package of the Go module in the folder `source`, whose go.sum pins every module. Raises UserError.

    Without debugging information, which costs a fifth of the processor time.
    """
    flags = ["-v", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false", "-ldflags", linker_flags]
    _make(partial, what, ["build", *flags, "-o", f"{partial}/", package], source, say)


def module_folder(what: str, module: str) -> Path:
    """Download a module, named `module@version`, and return the folder of its files. Raises UserError."""
    done = subprocess.run([_go(what), "mod", "download", "-json", module], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"Go could not download {module}:\n  {done.stdout or done.stderr}", ExitCode.UNAVAILABLE)
    return Path(json.loads(done.stdout)["Dir"])


def _make(partial: Path, what: str, arguments: Sequence[str], folder: Path | None, say: Say) -> None:
    go = _go(what)
    nice = commands.program("nice", f"building {what}", "coreutils")
    started = time.monotonic()

    def progress(lines: Sequence[str], passed: float) -> None:
        downloaded = sum("downloading" in line for line in lines)
        compiled = len(lines) - downloaded
        say(f"  {downloaded} modules downloaded, {compiled} packages compiled, {passed:.0f} s")

    commands.run(
        [nice, "-n", "10", go, *arguments],
        f"Go could not build {what}", {"GOBIN": str(partial), "CGO_ENABLED": "0"}, progress, folder=folder,
    )  # fmt: skip
    say(f"{what} is ready: {cache.megabytes(partial):.0f} MB in {time.monotonic() - started:.0f} s")


def _go(what: str) -> str:
    """Return the path of Go. Raises UserError if it is missing or too old."""
    wanted = f"{OLDEST[0]}.{OLDEST[1]}"
    go = commands.program("go", f"building {what}", f"Go {wanted} or later")
    output = subprocess.run([go, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"go(\d+)\.(\d+)", output)
    if found is not None and (int(found[1]), int(found[2])) < OLDEST:
        raise UserError(f"{what} needs Go {wanted} or later; `go` here is {found[0]}", ExitCode.UNAVAILABLE)
    return go
