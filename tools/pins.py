"""Resolve the pinned sets in requirements/: one set for each kind of machine, valid for every supported Python.

    python -m tools.pins             # after a change of requirements/*.in: keep versions if possible
    python -m tools.pins --upgrade   # the newest versions that are compatible on every Python and architecture

A set contains names and versions, and no URLs. Every version in it supports every Python.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.doctor import support
from tools.pip_settings import client_settings
from tools.setup import ROOT, UV_PROGRAM, VENV

PYTHONS = tuple(f"{major}.{minor}" for major, minor in reversed(support.PYTHONS))
"""Newest first: it supports the fewest versions of packages, and its versions constrain the older ones."""
REQUIREMENTS = ROOT / "requirements"


@dataclass(frozen=True)
class Kind:
    """A pinned set, and its inputs besides `requirements/NAME.in`."""

    name: str
    overrides: Path | None = None
    bound_by: Path | None = None
    """Another set. Shared packages have its versions."""


KINDS = (
    Kind("cpu", overrides=REQUIREMENTS / "overrides.txt"),
    Kind("gpu"),
    Kind("light", bound_by=REQUIREMENTS / "cpu.txt"),
)
Pins = Mapping[str, str]
"""Version by name."""


class Unresolvable(Exception):
    """Raised if no set of versions supports every Python and architecture, with the message of the resolver."""


def main(words: Sequence[str]) -> int:
    """Resolve and write all sets. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions")
    options = parser.parse_args(words)
    for kind in KINDS:
        target = REQUIREMENTS / f"{kind.name}.txt"
        try:
            text = merged(resolved(kind, {} if options.upgrade else pins(target.read_text())))
        except Unresolvable as failure:
            print(f"pins: {kind.name}: {failure}", file=sys.stderr)
            return 3
        target.write_text(text)
        print(f"pins: {target.relative_to(ROOT)}: {len(pins(text))} packages")
    return 0


def resolved(kind: Kind, preferred: Pins) -> dict[tuple[str, str], Pins]:
    """Return the set of each Python and architecture. Raises Unresolvable."""
    found: dict[tuple[str, str], Pins] = {}
    bound: dict[str, str] = pins(kind.bound_by.read_text()) if kind.bound_by else {}
    for python in PYTHONS:
        for machine in support.MACHINES:
            found[python, machine] = _compiled(kind, python, machine, bound, preferred)
            bound |= found[python, machine]
    return found


def merged(found: Mapping[tuple[str, str], Pins]) -> str:
    """Merge the sets into the text of one set. Raises Unresolvable if they differ between Pythons."""
    lines = []
    for name in sorted({name for one in found.values() for name in one}):
        places = {place for place, one in found.items() if name in one}
        versions = {found[place][name] for place in places}
        there = {machine for _, machine in places}
        if len(versions) > 1 or places != {(python, machine) for python, _ in found for machine in there}:
            raise Unresolvable(f"{name} differs between Pythons ({places}, {versions}): bound it in the .in file")
        lines.append(f"{name}=={versions.pop()}")
        if there != {machine for _, machine in found}:
            lines[-1] += " ; " + " or ".join(f'platform_machine == "{machine}"' for machine in sorted(there))
    pythons, machines = (", ".join(sorted({place[i] for place in found})) for i in (0, 1))
    head = f"# Made by `make pins` for CPython {pythons} on Linux with glibc, {machines}.\n"
    return head + "".join(f"{line}\n" for line in lines)


def pins(text: str) -> dict[str, str]:
    """Return version by name from the text of a set.

    >>> pins('# a set\\nnumpy==2.3.5\\nintel-openmp==2025.3.2 ; platform_machine == "x86_64"\\n')
    {'numpy': '2.3.5', 'intel-openmp': '2025.3.2'}
    """
    lines = (line.partition(";")[0].strip() for line in text.splitlines() if line and line[0].isalnum())
    return dict(line.split("==", 1) for line in lines)


def _compiled(kind: Kind, python: str, machine: str, bound: Pins, preferred: Pins) -> Pins:
    major, minor = support.GLIBC["gpu" if kind.name == "gpu" else "cpu"][machine]
    with tempfile.TemporaryDirectory() as folder:
        output, constraints = Path(folder) / "output.txt", Path(folder) / "constraints.txt"
        output.write_text(_listed(preferred))
        constraints.write_text(_listed(bound))
        command = [
            str(UV_PROGRAM), "pip", "compile", "--quiet", "--no-annotate", "--no-header",
            "--python-version", python, "--python-platform", f"{machine}-manylinux_{major}_{minor}",
            "--constraint", str(constraints), "--output-file", str(output), str(REQUIREMENTS / f"{kind.name}.in"),
        ]  # fmt: skip
        if kind.overrides:
            command += ["--override", str(kind.overrides)]
        done = subprocess.run(
            command, env=client_settings(VENV / "bin" / "pip"), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Unresolvable(f"Python {python} on {machine}:\n{done.stderr}")
        return pins(output.read_text())


def _listed(versions: Pins) -> str:
    return "".join(f"{name}=={version}\n" for name, version in versions.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
