"""usage: palimpsest doctor [--quiet] [RUN.toml] [--SECTION.KEY=VALUE ...]

Whether this machine can run Palimpsest, and why not.

palimpsest doctor                      # every check with its value
palimpsest doctor my.toml --run.id=a   # of this run: its folder, its ports
palimpsest doctor --quiet my.toml      # only what stops it, or may; `make run` begins with this

In a checkout that is not set up: python3 -m palimpsest.doctor (any Python from 3.9 on).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import palimpsest
from palimpsest.doctor import gather, judge, run_file
from palimpsest.doctor.findings import OK, STOPS, Finding
from palimpsest.doctor.machine import kind_of_machine

HOME = Path(__file__).resolve().parents[2]
"""The checkout, or the folder that the package is installed in."""
CONFIGURATION, UNAVAILABLE, INTERRUPTED = 2, 3, 130
"""Of palimpsest.common.user_error.ExitCode, which an older Python cannot import."""


def main(words: Sequence[str]) -> int:
    """Examine this machine; returns the exit code: 0 if a run can begin, 2 for an unknown flag, 3 if it cannot."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    keys = [word for word in words if word != "--quiet"]
    if unknown := run_file.unknown(keys):
        print(f"palimpsest doctor {unknown}: there is no such flag; --help lists those there are", file=sys.stderr)
        return CONFIGURATION
    values = run_file.named(keys, os.environ)
    checkout = HOME if is_checkout(HOME) else None
    installed = checkout is None or is_set_up(checkout)
    facts = gather.facts(checkout, kind_of_machine(), Path.cwd() / run_file.folder(values), run_file.ports(values))
    findings = judge.everything(facts, installed=installed)
    if len(keys) < len(words):
        for finding in findings:
            if finding.level != OK:
                print(f"doctor: {finding.sentence}", file=sys.stderr)
    else:
        print(subject(HOME, checkout=checkout is not None, installed=installed), "", *table(findings), sep="\n")
    return UNAVAILABLE if any(finding.level == STOPS for finding in findings) else 0


def is_checkout(folder: Path) -> bool:
    """Whether `make setup` can be called there. A folder that a wheel was installed in has none of this."""
    return (folder / "Makefile").is_file() and (folder / "tools" / "setup.py").is_file()


def is_set_up(checkout: Path) -> bool:
    """Whether `make setup` has made the environment."""
    return (checkout / ".setup" / "environment").is_file() and (checkout / ".venv" / "bin" / "python").exists()


def subject(home: Path, *, checkout: bool, installed: bool) -> str:
    """What is examined, and what is not.

    >>> subject(Path("/site-packages"), checkout=False, installed=True)
    'Palimpsest 0.1.0, installed in /site-packages: whether runs can begin here. What is installed is left alone.'
    """
    what = f"Palimpsest {palimpsest.__version__}"
    if not checkout:
        return f"{what}, installed in {home}: whether runs can begin here. What is installed is left alone."
    if installed:
        return f"{what} in the checkout {home}, set up: whether runs can begin here."
    return f"{what} in the checkout {home}, not set up yet: whether `make setup` can install it, and runs can begin."


def table(findings: Sequence[Finding]) -> list[str]:
    """One line for each check; below those that are not well, what it means and what to do."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:5}  {finding.check:{width}}  {finding.value}")
        if finding.level != OK:
            lines += [f"{'':{width + 9}}{text}" for text in (finding.meaning, finding.remedy) if text]
    stops, warnings = (sum(finding.level == level for finding in findings) for level in (STOPS, "warns"))
    lines += ["", f"{len(findings)} checks: {stops} stop a run, {warnings} may hinder it"]
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
