"""The flush buffer keeps the latest flush of each sampling."""

from palimpsest.services.learner.buffer.flushes import SAMPLINGS, FlushBuffer, Flushed
from tests.learner_parts.interruption import a_flush
from tests.records.builders import a_segment

SHORT = Flushed(a_flush(0, 0, tokens=6), 0, 3)
LONG = Flushed(a_flush(0, 0, tokens=9, segments=(a_segment(2, 6, 0), a_segment(6, 9, 1))), 0, 5)
OTHER_TOKENS = Flushed(a_flush(0, 0, tokens=[1, 2, 9, 9, 9, 9]), 0, 7)
OTHER_VERSION = Flushed(a_flush(0, 0, tokens=9, segments=(a_segment(2, 6, 1),)), 0, 8)


def test_a_later_flush_replaces_the_earlier_one_in_either_order() -> None:
    for first, second in ((SHORT, LONG), (LONG, SHORT)):
        flushes = FlushBuffer()
        assert flushes.add(first) == []
        assert flushes.add(second) == [SHORT]
        assert list(flushes) == [LONG]


def test_a_repeated_flush_is_superfluous() -> None:
    flushes, again = FlushBuffer(), Flushed(SHORT.record, 0, 4)
    flushes.add(SHORT)
    assert flushes.add(again) == [again]
    assert list(flushes) == [SHORT]


def test_different_tokens_or_versions_belong_to_another_sampling() -> None:
    flushes = FlushBuffer()
    for flushed in (SHORT, OTHER_TOKENS, OTHER_VERSION):
        assert flushes.add(flushed) == []
    assert flushes.of("g000000/0") == [SHORT, OTHER_TOKENS, OTHER_VERSION]
    assert len(flushes) == 3


def test_removed_and_forgotten_flushes_leave_the_buffer() -> None:
    flushes, other = FlushBuffer(), Flushed(a_flush(0, 1), 1, 0)
    for flushed in (SHORT, OTHER_TOKENS, other):
        flushes.add(flushed)
    flushes.remove(SHORT)
    flushes.remove(SHORT)
    assert flushes.forget("g000000/0") == [OTHER_TOKENS]
    assert flushes.forget("g000000/0") == []
    assert list(flushes) == [other]
    flushes.remove(other)
    assert len(flushes) == 0


def test_a_flood_of_flushes_of_one_trajectory_keeps_the_newest() -> None:
    flushes = FlushBuffer()
    flood = [Flushed(a_flush(0, 0, tokens=[1, 2, 3, number]), 0, number) for number in range(SAMPLINGS + 2)]
    assert [flushes.add(flushed) for flushed in flood] == [[]] * SAMPLINGS + [[flood[0]], [flood[1]]]
    assert list(flushes) == flood[2:]
