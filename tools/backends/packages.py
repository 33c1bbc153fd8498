"""Packages that are not requirements of the project, each in a folder of its own in the cache."""

import shutil
import subprocess
import sys
from pathlib import Path

from tools.backends import cache

UV = str(Path(sys.executable).with_name("uv"))
NEWEST = 13
"""Minor version of Python above which not all of these packages have releases."""


class NoPython(Exception):
    """The machine has no Python that the package needs; the text tells which."""


def library(requirement: str, *others: str) -> Path:
    """Return a folder for sys.path with this package and what it needs, or with `others` if they are given."""

    def install(folder: Path) -> None:
        packages = others or (requirement,)
        subprocess.run([UV, "pip", "install", "--quiet", "--target", str(folder), *packages], check=True)

    version = f"{sys.version_info.major}{sys.version_info.minor}"
    return cache.made(f"library-{version}-{requirement.replace('==', '-')}", install, print)


def interpreter(requirement: str, *, least: tuple[int, int] = (3, 11)) -> Path:
    """Return the Python of an environment with this package. Raises NoPython.

    least: version of Python that the package needs.
    """
    base = _python(least)

    def install(folder: Path) -> None:
        subprocess.run([UV, "venv", "--quiet", "--clear", "--relocatable", "--python", base, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([UV, "pip", "install", "--quiet", "--python", python, requirement], check=True)

    version = f"{sys.version_info.major}{max(sys.version_info.minor, least[1])}"
    return cache.made(f"environment-{version}-{requirement.replace('==', '-')}", install, print) / "bin" / "python"


def _python(least: tuple[int, int]) -> str:
    """Return a Python of at least this version. Raises NoPython."""
    named = [shutil.which(f"python3.{minor}") for minor in range(least[1], NEWEST + 1)]
    beside = Path(sys.base_prefix).parent.glob("3.*/bin/python")  # as pyenv keeps several
    for python in (sys.executable, *filter(None, named), *map(str, sorted(beside))):
        test = f"import sys; sys.exit(not {least} <= sys.version_info[:2] <= (3, {NEWEST}))"
        if subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0:
            return python
    raise NoPython(f"this machine has no Python from {least[0]}.{least[1]} to 3.{NEWEST}")
