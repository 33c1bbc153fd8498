"""The limit on unresolved groups: it falls only after many batches without a wait, and rises at once."""

from palimpsest.services.learner.buffer.admission import WINDOW, AdmissionLimit
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger


def a_limit() -> AdmissionLimit:
    return AdmissionLimit(groups_per_batch=8, highest=32)


def observe(limit: AdmissionLimit, batches: int, *, surplus: int, waited: bool = False) -> list[int]:
    limits = []
    for _ in range(batches):
        limit.observe(surplus=surplus, waited=waited)
        limits.append(limit.groups)
    return limits


def test_the_limit_falls_only_after_enough_batches_in_a_row_with_a_surplus() -> None:
    limit = a_limit()
    assert observe(limit, WINDOW - 1, surplus=6) == [32] * (WINDOW - 1)
    assert observe(limit, 1, surplus=5) == [32], "a smaller surplus begins the count again"
    assert observe(limit, WINDOW, surplus=6) == [32] * (WINDOW - 1) + [30]


def test_the_limit_stays_between_one_batch_and_the_staleness_bound() -> None:
    limit = a_limit()
    assert observe(limit, 100 * WINDOW, surplus=8)[-1] == 8
    assert observe(limit, 2, surplus=0, waited=True) == [12, 16]
    assert observe(limit, 100, surplus=0, waited=True)[-1] == 32


def test_the_limit_does_not_swing_between_the_two_conditions() -> None:
    limit = a_limit()
    observe(limit, WINDOW, surplus=6)
    assert set(observe(limit, 10 * WINDOW, surplus=5)) == {30}


def test_the_ledger_offers_fewer_groups_below_the_limit() -> None:
    ledger: TrajectoryLedger[str] = TrajectoryLedger(samples=1, groups_per_batch=1, max_staleness=2, time_limit_s=1)
    for _ in range(3):
        ledger.arrive(group := ledger.offer(now=0.0), f"{group}/0", "")
    for _ in range(WINDOW):
        ledger.adapt(waited=False)
    assert (ledger.admitted_groups, ledger.free_slots()) == (2, 0)
    ledger.adapt(waited=True)
    assert ledger.admitted_groups == 3
