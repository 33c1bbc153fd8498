"""The trajectory ledger: it balances after every event, and counts each trajectory once."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.messages import DropReason, group_id, trajectory_id
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import ArrivalStatus, TrajectoryLedger

SAMPLES = 3


def a_ledger(**changes: Any) -> TrajectoryLedger[str]:
    return TrajectoryLedger(
        **{"samples": SAMPLES, "groups_per_batch": 2, "max_staleness": 1, "time_limit_s": 10.0, **changes}
    )


def fill(ledger: TrajectoryLedger[str], index: int, samples: range = range(SAMPLES)) -> None:
    for sample in samples:
        name = trajectory_id(group_id(index), sample)
        assert ledger.arrive(group_id(index), name, name) is ArrivalStatus.NEW


def test_offers_at_most_what_the_staleness_bound_allows() -> None:
    ledger = a_ledger(max_staleness=2)
    assert ledger.free_slots() == 6
    for _ in range(6):
        ledger.offer(now=0.0)
    assert ledger.free_slots() == 0
    fill(ledger, 0)
    fill(ledger, 1)
    assert ledger.free_slots() == 0  # an arrived trajectory is unresolved
    assert ledger.take_batch(Version(0)) is not None
    assert ledger.free_slots() == 2


def test_takes_the_oldest_complete_groups_first() -> None:
    ledger = a_ledger()
    for _ in range(4):
        ledger.offer(now=0.0)
    for index in (3, 1, 2):
        fill(ledger, index)
    batch = ledger.take_batch(Version(0))
    assert batch is not None
    assert [group.group for group in batch] == ["g000001", "g000002"]


def test_a_group_waits_for_its_last_trajectory() -> None:
    ledger = a_ledger(groups_per_batch=1)
    ledger.offer(now=0.0)
    fill(ledger, 0, range(2))
    assert ledger.take_batch(Version(0)) is None
    fill(ledger, 0, range(2, 3))
    assert ledger.take_batch(Version(0)) is not None


def test_a_missing_trajectory_is_dropped_at_the_deadline_and_its_group_is_trained() -> None:
    ledger = a_ledger(groups_per_batch=1)
    ledger.offer(now=100.0)
    fill(ledger, 0, range(2))
    assert ledger.expire(now=110.0) == []
    assert ledger.expire(now=110.1) == ["g000000/2"]
    batch = ledger.take_batch(Version(0))
    assert batch is not None
    assert batch[0].items == ["g000000/0", "g000000/1"]
    assert ledger.arrive("g000000", "g000000/2", "late") is ArrivalStatus.DUPLICATE
    assert ledger.counts() == {
        "offered": 3, "trained": 2, "dropped": {"deadline": 1}, "dead_lettered": 0, "pending": 0,
    }  # fmt: skip


def test_a_group_with_one_remaining_trajectory_is_dropped() -> None:
    ledger = a_ledger(groups_per_batch=1)
    ledger.offer(now=0.0)
    fill(ledger, 0, range(1))
    ledger.drop("g000000", "g000000/1", DropReason.ENVIRONMENT_FAILED)
    ledger.dead_letter("g000000", "g000000/2")
    assert ledger.drop_small() == ["g000000/0"]
    assert ledger.counts() == {
        "offered": 3,
        "trained": 0,
        "dropped": {"environment_failed": 1, "group_too_small": 1},
        "dead_lettered": 1,
        "pending": 0,
    }


def arrive(ledger: TrajectoryLedger[str], index: int, newest: Sequence[int | None]) -> None:
    """Enter the first trajectories of a group, with the version of each one's newest token."""
    for sample, version in enumerate(newest):
        name = trajectory_id(group_id(index), sample)
        ledger.arrive(group_id(index), name, name, newest=None if version is None else Version(version))


def test_a_trajectory_without_a_token_inside_the_bound_is_dropped_and_its_siblings_are_trained() -> None:
    ledger = a_ledger(groups_per_batch=1, max_staleness=2)
    ledger.offer(now=0.0)
    arrive(ledger, 0, [3, 4, None])
    assert ledger.drop_stale(Version(6)) == []
    (ready,) = ledger.take_batch(Version(6)) or []
    assert (ready.items, ready.stale) == (["g000000/1", "g000000/2"], ["g000000/0"])
    assert ledger.counts() == {
        "offered": 3, "trained": 2, "dropped": {"over_staleness": 1}, "dead_lettered": 0, "pending": 0,
    }  # fmt: skip


def test_a_group_without_a_token_inside_the_bound_is_dropped_once_it_is_complete() -> None:
    ledger = a_ledger(groups_per_batch=1, max_staleness=2)
    ledger.offer(now=0.0)
    arrive(ledger, 0, [3, 2])
    assert ledger.drop_stale(Version(6)) == [], "its last trajectory may have younger tokens"
    ledger.drop("g000000", "g000000/2", DropReason.ENVIRONMENT_FAILED)
    assert ledger.drop_stale(Version(5)) == []
    assert ledger.drop_stale(Version(6)) == ["g000000/0", "g000000/1"]
    assert ledger.counts()["dropped"] == {"environment_failed": 1, "over_staleness": 2}


def test_groups_of_equal_rewards_are_dropped_once_they_are_complete() -> None:
    rewards = {"g000000/0": 1.0, "g000000/1": 1.0, "g000001/0": 0.0, "g000001/1": 1.0, "g000002/0": 0.5}
    ledger = a_ledger(samples=2)
    for _ in range(3):
        ledger.offer(now=0.0)
    for index, samples in ((0, range(2)), (1, range(2)), (2, range(1))):
        fill(ledger, index, samples)
    assert ledger.drop_even(rewards.__getitem__) == [["g000000/0", "g000000/1"]]
    assert ledger.counts()["dropped"] == {"even_group": 2}
    assert ledger.free_slots() == 2, "the learner may offer another group"


def test_a_batch_waits_for_a_group_that_was_overtaken_as_often_as_permitted() -> None:
    ledger = a_ledger(groups_per_batch=1, max_overtaking=2)
    for index in range(1, 4):
        while ledger.free_slots():
            ledger.offer(now=0.0)
        fill(ledger, index)
        taken = ledger.take_batch(Version(0))
        assert (taken is None) is (index == 3), f"group 0 was overtaken {ledger.overtaken('g000000')} times"
    assert ledger.overtaken("g000000") == 2
    restarted = a_ledger(groups_per_batch=1, max_overtaking=2)
    restarted.restore(ledger.state(), now=0.0)
    fill(restarted, 3)
    assert restarted.take_batch(Version(0)) is None, "the state of a checkpoint counts it too"
    fill(ledger, 0)
    assert [ready.group for ready in ledger.take_batch(Version(0)) or []] == ["g000000"]
    assert [ready.group for ready in ledger.take_batch(Version(0)) or []] == ["g000003"]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 3), st.integers(0, 7))
def test_a_group_is_trained_within_the_proven_bounds(data: st.DataObject, batch: int, bound: int, window: int) -> None:
    """The two bounds of docs/algorithms/admission.md, over random orders of completion."""
    ledger = a_ledger(samples=1, groups_per_batch=batch, max_staleness=bound, max_overtaking=window)
    offered, completed, flying, version = dict[int, int](), dict[int, int](), list[int](), 0
    while version < 12:
        for _ in range(ledger.free_slots()):
            offered[ledger.next_index] = version
            flying.append(ledger.next_index)
            ledger.offer(now=0.0)
        if (taken := ledger.take_batch(Version(version))) is None:
            index = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            completed[index] = version
            arrive(ledger, index, [version])
            continue
        for ready in taken:
            index = int(ready.group[1:])
            assert ready.items
            assert version - completed[index] <= bound
            assert version - offered[index] <= bound + -(-window // batch)
        for _ in range(data.draw(st.integers(0, len(flying)))):  # they complete during the training
            index = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            completed[index] = version
            arrive(ledger, index, [version])
        version += 1


@pytest.mark.parametrize(
    ("group", "trajectory"),
    [
        ("g000009", "g000009/0"),
        ("g000000", "g000000/3"),
        ("g000000", "g000001/0"),
        ("g000000", ""),
        ("", ""),
        ("other", "other/0"),
        ("g000000", "g000000/x"),
    ],
)
def test_an_id_that_was_never_offered_is_unknown(group: str, trajectory: str) -> None:
    ledger = a_ledger()
    ledger.offer(now=0.0)
    before = ledger.counts()
    assert ledger.arrive(group, trajectory, "?") is ArrivalStatus.UNKNOWN
    assert ledger.drop(group, trajectory, DropReason.DEADLINE) is ArrivalStatus.UNKNOWN
    assert ledger.counts() == before


def test_a_valid_record_recovers_a_dead_letter_while_its_group_is_open() -> None:
    ledger = a_ledger(groups_per_batch=1)
    ledger.offer(now=0.0)
    fill(ledger, 0, range(2))
    ledger.dead_letter("g000000", "g000000/2")
    assert ledger.counts()["dead_lettered"] == 1
    assert ledger.arrive("g000000", "g000000/2", "sound") is ArrivalStatus.RECOVERED
    assert ledger.counts()["dead_lettered"] == 0
    assert ledger.dead_letter("g000000", "g000000/2") is ArrivalStatus.DUPLICATE, (
        "a second dead letter does not undo the recovery"
    )
    (batch,) = ledger.take_batch(Version(0)) or []
    assert batch.items == ["g000000/0", "g000000/1", "sound"]


def test_a_drop_recovers_a_dead_letter() -> None:
    ledger = a_ledger()
    ledger.offer(now=0.0)
    ledger.dead_letter("g000000", "g000000/2")
    assert ledger.drop("g000000", "g000000/2", DropReason.ENVIRONMENT_FAILED) is ArrivalStatus.RECOVERED
    assert ledger.drop("g000000", "g000000/2", DropReason.ENVIRONMENT_FAILED) is ArrivalStatus.DUPLICATE
    assert ledger.counts() == {
        "offered": 3, "trained": 0, "dropped": {"environment_failed": 1}, "dead_lettered": 0, "pending": 2,
    }  # fmt: skip


def test_a_dead_letter_of_a_closed_group_is_final() -> None:
    ledger = a_ledger()
    ledger.offer(now=0.0)
    for sample in range(SAMPLES):
        ledger.dead_letter("g000000", f"g000000/{sample}")
    assert ledger.arrive("g000000", "g000000/2", "sound") is ArrivalStatus.DUPLICATE
    assert ledger.counts() == {"offered": 3, "trained": 0, "dropped": {}, "dead_lettered": 3, "pending": 0}


@pytest.mark.parametrize("name", ["g000000/00", "g0/0", "g+0/0", "g000000/0 "])
def test_an_id_in_a_noncanonical_form_is_unknown(name: str) -> None:
    ledger = a_ledger()
    ledger.offer(now=0.0)
    group = name.rpartition("/")[0]
    assert ledger.arrive(group, name, "?") is ArrivalStatus.UNKNOWN
    for sample in range(SAMPLES):
        ledger.dead_letter("g000000", f"g000000/{sample}")
    assert ledger.arrive(group, name, "?") is ArrivalStatus.UNKNOWN, "also in a closed group"


events = st.lists(
    st.tuples(
        st.sampled_from(["offer", "arrive", "drop", "dead", "batch", "expire", "stale", "small", "restart"]),
        st.integers(0, 7),
        st.integers(0, SAMPLES),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(events)
def test_the_ledger_balances_after_every_event(schedule: list[tuple[str, int, int]]) -> None:
    """Compare with a naive model in which each id has one outcome."""
    ledger, ends, clock = a_ledger(), dict[str, str](), 0.0
    offered: set[str] = set()
    arrived: dict[str, str] = {}
    for what, index, sample in schedule:
        clock += 1.0
        group, name = group_id(index), trajectory_id(group_id(index), sample)
        fresh = name in offered and name not in ends and name not in arrived
        lost = ends.get(name) == "dead" and any(f"{group}/{s}" not in ends for s in range(SAMPLES))
        match what:
            case "offer" if ledger.free_slots():
                opened = ledger.offer(now=clock)
                offered |= {trajectory_id(opened, s) for s in range(SAMPLES)}
            case "arrive":
                came = ledger.arrive(group, name, name, newest=Version(sample))
                assert (came is ArrivalStatus.NEW) is fresh
                assert (came is ArrivalStatus.RECOVERED) is lost
                if fresh or lost:
                    ends.pop(name, None)
                    arrived[name] = name
            case "drop":
                came = ledger.drop(group, name, DropReason.ENGINE_FAILED)
                assert (came is ArrivalStatus.NEW) is fresh
                assert (came is ArrivalStatus.RECOVERED) is lost
                if fresh or lost:
                    ends[name] = what
            case "dead":
                assert (ledger.dead_letter(group, name) is ArrivalStatus.NEW) is fresh
                if fresh:
                    ends[name] = what
            case "expire":
                for late in ledger.expire(now=clock):
                    assert late not in ends
                    ends[late] = "deadline"
            case "stale":
                for item in ledger.drop_stale(Version(index)):
                    ends[arrived.pop(item)] = "stale"
            case "small":
                for item in ledger.drop_small():
                    ends[arrived.pop(item)] = "small"
            case "batch":
                ledger.expire(now=0.0)
                for item in ledger.drop_small():
                    ends[arrived.pop(item)] = "small"
                for batched in ledger.take_batch(Version(2)) or []:
                    assert len(batched.items) + len(batched.stale) >= 2
                    for item in batched.items:
                        ends[arrived.pop(item)] = "trained"
                    for item in batched.stale:
                        ends[arrived.pop(item)] = "stale"
            case "restart":
                state = ledger.state()
                ledger = a_ledger()
                ledger.restore(state, now=clock)
                for name_, item in arrived.items():  # the log is read a second time
                    again = ledger.arrive(
                        name_.rpartition("/")[0], name_, item, newest=Version(int(name_.rpartition("/")[2]))
                    )
                    assert again is ArrivalStatus.NEW
        counts = ledger.counts()
        assert counts["offered"] == len(offered)
        assert counts["trained"] == sum(end == "trained" for end in ends.values())
        assert counts["dead_lettered"] == sum(end == "dead" for end in ends.values())
        assert sum(counts["dropped"].values()) == sum(end not in ("trained", "dead") for end in ends.values())
        assert counts["pending"] == len(offered) - len(ends)
        assert ledger.waiting() == len(arrived)
