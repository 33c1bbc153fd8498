"""Sections of a failed test's report: the command that repeats it, its seed, and the ends of its logs."""

import shlex
import time
from pathlib import Path

import pytest

LAST_LINES = 40
MOST_LOGS = 12
folders: list[Path] = []
"""Folders with logs: the temporary folder of this process, and those of the session's shared servers."""
_begun: dict[Path, float] = {}
"""Test file -> start of its first test. Logs of the file's fixtures are not older."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record the start of the file's first test."""
    _begun.setdefault(item.path, time.time())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:  # type: ignore[misc]
    """Add the sections to the report of a failure."""
    report: pytest.TestReport = yield
    if report.failed:
        report.sections.append(("repeat it alone", repeat(item)))
        report.sections += [(f"end of {path}", end) for path, end in logs(_begun.get(item.path, 0.0))]
    return report


def repeat(item: pytest.Item) -> str:
    """Command that runs only this test, and its seed if known."""
    name = item.nodeid
    if name.rfind("@") > name.rfind("]"):  # xdist appends the group
        name = name.rpartition("@")[0]
    callspec = getattr(item, "callspec", None)
    seeds = {**(callspec.params if callspec else {}), **dict(item.user_properties)}
    seed = [f"seed: {seeds['seed']}"] if "seed" in seeds else []
    return "\n".join([f'make test ARGS="{shlex.quote(name)}"', *seed])


def logs(since: float) -> list[tuple[Path, str]]:
    """Path and last lines of the newest logs written since `since`, the newest last."""
    found = []
    for path in {path for folder in folders for path in folder.rglob("*.log") if not path.stem.isdigit()}:
        try:  # names of digits are segments of Kafka's log
            written, text = path.stat().st_mtime, path.read_text(errors="replace")
        except OSError:  # deleted meanwhile
            continue
        if written >= since and text.strip():
            found.append((written, path, "\n".join(text.strip().splitlines()[-LAST_LINES:])))
    return [(path, end) for _, path, end in sorted(found)[-MOST_LOGS:]]
