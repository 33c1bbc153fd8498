"""Groups of tests that one worker of pytest-xdist runs in sequence, and the order of the groups.

A group is one unit of work: a worker takes the next group when it has nearly finished its own. Long groups start first,
so that the many short ones fill the remaining time. See docs/testing.md.
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
"""Prefixes of paths. Other marked tests come next, then all remaining tests in the order of the files."""
ALONE = (
    "tests/integration/test_cut_schedules.py",
    "tests/integration/test_learner_schedules.py",
    "tests/architecture/test_readme.py",
)
"""Files with long, independent tests, which are distributed one by one."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Assign every test to its group, and sort the groups."""
    for item in items:
        if (group := group_of(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_rank)  # stable: keeps the order within a group


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail if pytest-xdist ignores the groups: tests that share a server would run concurrently."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        group = group_of(item)
        if group is not None and not item.nodeid.endswith(f"@{group}"):
            raise pytest.UsageError(f"pytest-xdist does not know the group of {item.nodeid}: see pytest in dev.in")


def group_of(item: pytest.Item) -> str | None:
    """Name of the test's group, or None if the test is distributed alone."""
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
