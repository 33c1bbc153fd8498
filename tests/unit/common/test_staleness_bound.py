"""The staleness bound while people change its number: what was promised before a change holds after it."""

from hypothesis import given, strategies as st

from palimpsest.common.staleness_bound import StalenessBound
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger


def allowed(bound: StalenessBound, versions: range) -> list[int]:
    return [bound.allowed(Version(version)) for version in versions]


def test_a_higher_bound_admits_no_version_that_was_outside_before() -> None:
    """The store may have removed the weights of version 5, which was outside the bound at version 10."""
    bound = StalenessBound(4, [(10, 7)])
    assert allowed(bound, range(8, 16)) == [4, 4, 4, 5, 6, 7, 7, 7]


def test_a_lower_bound_waits_for_the_groups_that_were_offered_before() -> None:
    bound = StalenessBound(4, [(10, 1)])
    assert allowed(bound, range(8, 17)) == [4, 4, 4, 4, 4, 4, 4, 1, 1]


def test_a_change_during_the_wait_for_an_earlier_one() -> None:
    assert allowed(StalenessBound(4, [(10, 0), (12, 2)]), range(10, 19)) == [4, 4, 4, 4, 4, 4, 4, 2, 2]
    assert allowed(StalenessBound(0, [(10, 5), (12, 1)]), range(10, 19)) == [0, 1, 2, 3, 4, 5, 5, 5, 1]


def test_two_changes_at_one_version() -> None:
    """Between them the learner may have offered groups under the first one."""
    assert allowed(StalenessBound(0, [(5, 2), (5, 0)]), range(5, 9)) == [0, 1, 2, 0]


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=4),
    st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_changes_drop_no_complete_group_and_admit_no_older_version(
    first: int, steps: list[tuple[int, int]], eager: list[bool]
) -> None:
    """Workers sample each group with the version of its offer, at once or late."""
    ledger: TrajectoryLedger[int] = TrajectoryLedger(samples=1, groups_per_batch=1, max_staleness=first, time_limit_s=1)
    changes, left = list[tuple[int, int]](), list(steps)
    waiting: list[tuple[str, Version]] = []
    lowest, due = Version(-first), 0
    for now in map(Version, range(40)):
        if left and now >= due:
            gap, number = left.pop(0)
            changes.append((now, number))
            ledger.use_bound(StalenessBound(first, changes))
            due = now + gap
        assert ledger.bound.lowest(now) >= lowest, "the store may have removed these weights"
        lowest = ledger.bound.lowest(now)
        waiting += [(ledger.offer(now=0.0), now) for _ in range(ledger.free_slots())]
        while waiting and (eager[now] or ledger.complete() == 0):
            group, offered = waiting.pop(0)
            ledger.arrive(group, f"{group}/0", offered, newest=offered)
        assert ledger.drop_stale(now) == []
        (ready,) = ledger.take_batch(now) or []
        assert now - ready.items[0] <= ledger.bound.allowed(now)
