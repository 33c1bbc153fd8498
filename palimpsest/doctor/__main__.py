"""usage: palimpsest doctor [--quiet] [--gpu] [RUN.toml] [--SECTION.KEY=VALUE ...]

Check whether this machine can run Palimpsest.

palimpsest doctor                      # print every check with its value
palimpsest doctor my.toml --run.id=a   # check the folder, the ports and the chat template of this run too
palimpsest doctor --quiet my.toml      # print only problems; `make run` starts with this
palimpsest doctor --gpu my.toml        # compute on the GPUs, too: kernels, repeated passes, sums; takes a minute

Before `make setup`: python3 -m palimpsest.doctor (Python 3.9 or later).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import palimpsest
from palimpsest.doctor import gather, judge, run_file
from palimpsest.doctor.findings import OK, STOPS, WARNS, Finding
from palimpsest.doctor.machine import kind_of_machine

HOME = Path(__file__).resolve().parents[2]
"""The checkout, or the folder of the installed package."""
NOT_SET_UP = Finding("GPU checks", "skipped: they need the installed packages", WARNS, "", "Run `make setup` first.")
CONFIGURATION, UNAVAILABLE, INTERRUPTED = 2, 3, 130
"""Values of palimpsest.common.user_error.ExitCode, which Python 3.9 and 3.10 cannot import."""


def main(words: Sequence[str]) -> int:
    """Check this machine. Returns the exit code: 0 if a run can start, 2 for an unknown flag, 3 otherwise."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    keys = [word for word in words if word not in ("--quiet", "--gpu")]
    if unknown := run_file.unknown(keys):
        print(f"palimpsest doctor {unknown}: there is no such flag; --help lists the flags", file=sys.stderr)
        return CONFIGURATION
    values = run_file.named(keys, os.environ)
    checkout = HOME if is_checkout(HOME) else None
    installed = checkout is None or is_set_up(checkout)
    facts = gather.facts(checkout, kind_of_machine(), Path.cwd() / run_file.folder(values), run_file.ports(values))
    if values.get("env_gateway.code_tools") == "bubblewrap":
        facts = replace(facts, bubblewrap_missing=shutil.which("bwrap") is None)
    quiet = "--quiet" in words
    python = checkout / ".venv" / "bin" / "python" if checkout else Path(sys.executable)
    if installed:
        kind = str(values.get("tracking.kind", "none"))
        facts = replace(facts, tracking=gather.missing_tracking(kind, python))
    if installed and not quiet and run_file.names_a_run(keys):  # before a run, its worker proves the template
        facts = replace(facts, template=gather.template(keys, python))
    findings = judge.everything(facts, installed=installed)
    if "--gpu" in words:
        findings += gather.gpu(keys, python) if installed else [NOT_SET_UP]
    if quiet:
        for finding in findings:
            if finding.level != OK:
                print(f"doctor: {finding.sentence}", file=sys.stderr)
    else:
        print(subject(HOME, checkout=checkout is not None, installed=installed), "", *table(findings), sep="\n")
    return UNAVAILABLE if any(finding.level == STOPS for finding in findings) else 0


def is_checkout(folder: Path) -> bool:
    """Return whether the folder is a checkout, where `make setup` works, and not an installed wheel."""
    return (folder / "Makefile").is_file() and (folder / "tools" / "setup.py").is_file()


def is_set_up(checkout: Path) -> bool:
    """Return whether `make setup` created the environment."""
    return (checkout / ".setup" / "environment").is_file() and (checkout / ".venv" / "bin" / "python").exists()


def subject(home: Path, *, checkout: bool, installed: bool) -> str:
    """Return the line that says which installation is checked.

    >>> subject(Path("/site-packages"), checkout=False, installed=True)
    'Palimpsest 0.1.0, installed in /site-packages: checks whether runs can start'
    """
    what = f"Palimpsest {palimpsest.__version__}"
    if not checkout:
        return f"{what}, installed in {home}: checks whether runs can start"
    if installed:
        return f"{what} in the checkout {home}, set up: checks whether runs can start"
    return f"{what} in the checkout {home}, not set up: checks whether `make setup` can install it and runs can start"


def table(findings: Sequence[Finding]) -> list[str]:
    """Return the lines of the report: each check, and below each problem its meaning and the remedy."""
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently when `| head` closes the pipe
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
