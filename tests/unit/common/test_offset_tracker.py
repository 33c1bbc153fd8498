"""The offset tracker, compared with a model that keeps every offset."""

from dataclasses import dataclass, field

from hypothesis import given, settings, strategies as st

from palimpsest.common.offset_tracker import OffsetTracker


@dataclass
class Naive:
    """Offsets of one partition that were read and resolved, in sets."""

    following: int
    read: set[int] = field(default_factory=set)
    resolved: set[int] = field(default_factory=set)

    def frontier(self) -> int:
        return min(self.read - self.resolved, default=self.following)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_frontier_is_the_lowest_offset_read_and_not_resolved(data: st.DataObject) -> None:
    frontier, naive = OffsetTracker(), dict[int, Naive]()
    for _ in range(data.draw(st.integers(0, 40))):
        partition = data.draw(st.integers(0, 2))
        known = naive.get(partition)
        match data.draw(st.sampled_from(["start", "read", "read", "resolve", "resolve", "resolve again", "forget"])):
            case "start" if known is None:
                offset = data.draw(st.integers(0, 5))
                frontier.start(partition, offset)
                naive[partition] = Naive(offset)
            case "read":
                gap = data.draw(st.integers(0, 2))  # a log may have gaps
                offset = known.following + gap if known else gap
                frontier.read(partition, offset)
                known = naive.setdefault(partition, Naive(0))
                known.read.add(offset)
                known.following = offset + 1
            case "resolve" if known and known.read - known.resolved:
                offset = data.draw(st.sampled_from(sorted(known.read - known.resolved)))
                frontier.resolve(partition, offset)
                known.resolved.add(offset)
            case "resolve again" if known and known.resolved:
                frontier.resolve(partition, data.draw(st.sampled_from(sorted(known.resolved))))
            case "forget":
                frontier.forget(partition)
                naive.pop(partition, None)
        if data.draw(st.booleans()):  # a query changes no state
            assert frontier.offsets() == {p: n.frontier() for p, n in naive.items()}
    assert frontier.offsets() == {p: n.frontier() for p, n in naive.items()}


def test_a_partition_not_read_from_yet_starts_where_reading_starts() -> None:
    frontier = OffsetTracker()
    frontier.start(3, 17)
    assert frontier.offsets() == {3: 17}


def test_a_record_resolved_late_advances_the_frontier_over_resolved_records_after_it() -> None:
    frontier = OffsetTracker()
    for offset in range(100):
        frontier.read(0, offset)
    for offset in range(99, 0, -1):
        frontier.resolve(0, offset)
        assert frontier.offsets() == {0: 0}
    frontier.resolve(0, 0)
    assert frontier.offsets() == {0: 100}


def test_a_forgotten_partition_starts_at_its_next_read() -> None:
    frontier = OffsetTracker()
    frontier.read(1, 4)
    frontier.resolve(1, 4)
    frontier.forget(1)
    assert frontier.offsets() == {}
    frontier.read(1, 2)
    assert frontier.offsets() == {1: 2}


def test_a_record_resolved_after_its_partition_was_revoked_counts_when_it_is_read_again() -> None:
    frontier = OffsetTracker()
    frontier.read(1, 4)
    frontier.forget(1)
    frontier.resolve(1, 4)
    assert frontier.offsets() == {}
    frontier.read(1, 4)
    assert frontier.offsets() == {1: 5}


def test_a_record_that_was_read_again_is_resolved_once() -> None:
    frontier = OffsetTracker()
    for offset in (4, 5, 4, 5):
        frontier.read(0, offset)
    for offset in (4, 5, 4):
        frontier.resolve(0, offset)
    assert frontier.offsets() == {0: 6}
