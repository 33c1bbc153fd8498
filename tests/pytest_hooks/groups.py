"""Which tests run one after another in the same worker of pytest-xdist, and in which order they begin.

A group is one unit of work: a worker takes the next one when it is nearly done with its own. Long groups begin first,
so that the many short ones fill what is left of the time. See docs/testing.md.
"""

import pytest

ENGINE = "vllm"
"""One group for every test that starts a vLLM engine: its start takes a core for half a minute and over 1 GB."""
LONGEST_FIRST = (
    "tests/e2e/",
    "tests/integration/test_cluster_faults.py",
    "tests/integration/test_fencing.py",
    "tests/integration/test_bad_data.py",
    "tests/integration/test_exact_routes_over_kafka.py",
    "tests/integration/test_crashes.py",
    "tests/integration/test_interrupted_runs.py",
    "tests/integration/test_two_ranks.py",
    "tests/integration/test_kafka_outage.py",
    "tests/integration/",
)
"""Beginnings of paths. Tests that are marked and match none come next, then all others in the order of the files."""
ALONE = (
    "tests/integration/test_cut_schedules.py",
    "tests/integration/test_learner_schedules.py",
    "tests/architecture/test_readme.py",
)
"""Files whose tests are long, share nothing, and are dealt out one by one."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test into its group, and the groups into their order."""
    for item in items:
        if (group := group_of(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_rank)  # stable: within a group nothing changes


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where xdist runs the tests and has not taken the groups up: tests that share a server would meet."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        group = group_of(item)
        if group is not None and not item.nodeid.endswith(f"@{group}"):
            raise pytest.UsageError(f"pytest-xdist does not know the group of {item.nodeid}: see pytest in dev.in")


def group_of(item: pytest.Item) -> str | None:
    """The name of the test's group; None: it is a unit by itself."""
    path = _path(item)
    if item.get_closest_marker("vllm"):
        return ENGINE
    if path in ALONE:
        return None
    return f"{path} servers" if item.get_closest_marker("servers") else path


def _rank(item: pytest.Item) -> int:
    if not any(item.get_closest_marker(marker) for marker in ("servers", "vllm", "thorough")):
        return len(LONGEST_FIRST) + 1
    path = _path(item)
    return next((rank for rank, start in enumerate(LONGEST_FIRST) if path.startswith(start)), len(LONGEST_FIRST))


def _path(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
