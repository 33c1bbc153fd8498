"""What a failed test prints besides its error: how to repeat it alone, its seed, the ends of the logs it wrote."""

import shlex
import time
from pathlib import Path

import pytest

LAST_LINES = 40
MOST_LOGS = 12
folders: list[Path] = []
"""Where to look for logs: the temporary folder of this process, and that of the session's shared servers."""
_begun: dict[Path, float] = {}
"""A file of tests -> when its first test began: fixtures of the file, and so their logs, are no older."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when the file's first test began."""
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
    """The command that runs this test and no other; and its seed, where it is known."""
    name = item.nodeid
    if name.rfind("@") > name.rfind("]"):  # xdist appends the group
        name = name.rpartition("@")[0]
    callspec = getattr(item, "callspec", None)
    seeds = {**(callspec.params if callspec else {}), **dict(item.user_properties)}
    said = [f"seed: {seeds['seed']}"] if "seed" in seeds else []
    return "\n".join([f'make test ARGS="{shlex.quote(name)}"', *said])


def logs(since: float) -> list[tuple[Path, str]]:
    """The last lines of every log written since then, the newest last."""
    found = []
    for path in {path for folder in folders for path in folder.rglob("*.log") if not path.stem.isdigit()}:
        try:  # digits: segments of Kafka's own log
            written, text = path.stat().st_mtime, path.read_text(errors="replace")
        except OSError:  # gone meanwhile
            continue
        if written >= since and text.strip():
            found.append((written, path, "\n".join(text.strip().splitlines()[-LAST_LINES:])))
    return [(path, end) for _, path, end in sorted(found)[-MOST_LOGS:]]
