"""One cut's state: it ends when all have answered, or at its deadline, and only its own answers count."""

import random

from palimpsest.common.messages import CutReached, CutReleased, CutRequested, VersionPublished
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.interruption.cut import Cut, next_number
from tests.learner_parts.interruption import reached


def a_cut(number: int = 7) -> Cut:
    return Cut(number, Version(3), requested_at=100.0, deadline_s=5.0)


def test_it_is_over_when_every_worker_has_answered() -> None:
    cut = a_cut()
    assert cut.is_waiting({"a", "b"}, now=100.0)
    assert cut.take(reached("b", 7))
    assert cut.is_waiting({"a", "b"}, now=101.0)
    assert cut.take(reached("a", 7))
    assert not cut.is_waiting({"a", "b"}, now=101.0)
    assert (cut.workers, cut.answered, cut.late) == (("a", "b"), ("a", "b"), ())


def test_the_deadline_leaves_out_who_has_not_answered() -> None:
    cut = a_cut()
    cut.take(reached("a", 7))
    assert cut.is_waiting({"a", "b"}, now=104.999)
    assert not cut.is_waiting({"a", "b"}, now=105.0)
    assert (cut.answered, cut.late) == (("a",), ("b",))


def test_after_an_outage_the_workers_have_their_whole_time_again() -> None:
    cut = a_cut()
    cut.restart_deadline(now=10_000.0)
    assert cut.is_waiting({"a"}, now=10_004.9)
    assert not cut.is_waiting({"a"}, now=10_005.0)


def test_an_answer_to_a_former_cut_is_no_answer() -> None:
    cut = a_cut()
    assert not cut.take(reached("a", 6, {0: 99}))
    assert not cut.take(reached("a", 8, {0: 99}))
    assert cut.is_waiting({"a"}, now=101.0)
    assert cut.positions == {}


def test_a_worker_that_comes_meanwhile_is_waited_for_and_one_that_falls_silent_is_not() -> None:
    cut = a_cut()
    cut.take(reached("a", 7))
    assert not cut.is_waiting({"a"}, now=100.5)
    assert cut.is_waiting({"a", "new"}, now=101.0)
    assert not cut.is_waiting({"a"}, now=102.0)
    assert (cut.answered, cut.late) == (("a",), ("new",))


def test_without_workers_there_is_nothing_to_wait_for() -> None:
    cut = a_cut()
    assert not cut.is_waiting(frozenset(), now=100.0)
    assert (cut.workers, cut.late) == ((), ())


def test_an_answer_counts_though_nobody_knew_of_the_worker() -> None:
    cut = a_cut()
    cut.take(reached("unheard of", 7, {1: 4}))
    assert cut.workers == cut.answered == ("unheard of",)
    assert cut.positions == {1: 4}


def test_positions_are_the_greatest_that_any_worker_told_of_in_any_order() -> None:
    draw = random.Random(6)
    for _ in range(200):
        answers = [
            CutReached("test", f"w{w}", 7, 3, {p: draw.randrange(50) for p in draw.sample(range(4), 2)}, 0, 0.0)
            for w in range(5)
        ]
        wanted: dict[int, int] = {}
        for answer in answers:
            for partition, offset in answer.positions.items():
                wanted[partition] = max(offset, wanted.get(partition, 0))
        for order in (answers, answers[::-1], answers + answers):
            cut = a_cut()
            assert all(cut.take(answer) for answer in order)
            assert cut.positions == wanted


def test_cuts_go_on_counting_after_the_last_one_on_the_log() -> None:
    control = [
        VersionPublished("test", Version(0), "d", 0.0),
        CutRequested("test", 1, Version(0), 5.0),
        CutReleased("test", 1),
        CutRequested("test", 2, Version(0), 5.0),
        VersionPublished("test", Version(1), "d", 0.0),
    ]
    assert next_number(control) == 3
    assert next_number(control[:1]) == 1
