"""Whether this machine can run Palimpsest, and why not.

python3 -m palimpsest.doctor                      # every check with its value
python3 -m palimpsest.doctor my.toml --run.id=a   # of this run: its folder, its ports
python3 -m palimpsest.doctor --quiet my.toml      # only what stops it, or may; `make run` begins with this
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from palimpsest.doctor import gather, judge, run_file
from palimpsest.doctor.findings import OK, STOPS, Finding
from palimpsest.doctor.machine import kind_of_machine

ROOT = Path(__file__).resolve().parents[2]
UNAVAILABLE = 3
"""palimpsest.common.user_error.ExitCode.UNAVAILABLE, which an older Python cannot import."""


def main(words: Sequence[str]) -> int:
    """Examine this machine; returns the exit code: 0 if a run can begin, 3 if not."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    quiet = "--quiet" in words
    values = run_file.named([word for word in words if word != "--quiet"], os.environ)
    facts = gather.facts(ROOT, kind_of_machine(), ROOT / run_file.folder(values), run_file.ports(values))
    installed = (ROOT / ".setup" / "environment").is_file() and (ROOT / ".venv" / "bin" / "python").exists()
    findings = judge.everything(facts, installed=installed)
    if quiet:
        for finding in findings:
            if finding.level != OK:
                print(f"doctor: {finding.sentence}", file=sys.stderr)
    else:
        print(*table(findings), sep="\n")
    return UNAVAILABLE if any(finding.level == STOPS for finding in findings) else 0


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
    sys.exit(main(sys.argv[1:]))
