"""State of one cut: it ends when all workers have answered or at its deadline; only its own answers count."""

import random

from palimpsest.common.messages import CutReached, CutReleased, CutRequested, VersionPublished
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.interruption.cut import Cut, next_number
from tests.learner_parts.interruption import reached


def a_cut(number: int = 7) -> Cut:
    return Cut(number, Version(3), requested_at=100.0, deadline_s=5.0)


def test_a_cut_is_over_when_every_worker_has_answered() -> None:
    cut = a_cut()
    assert cut.is_waiting({"a", "b"}, now=100.0)
    assert cut.take(reached("b", 7))
    assert cut.is_waiting({"a", "b"}, now=101.0)
    assert cut.take(reached("a", 7))
    assert not cut.is_waiting({"a", "b"}, now=101.0)
    assert (cut.workers, cut.answered, cut.late) == (("a", "b"), ("a", "b"), ())


def test_the_deadline_leaves_out_workers_without_an_answer() -> None:
    cut = a_cut()
    cut.take(reached("a", 7))
    assert cut.is_waiting({"a", "b"}, now=104.999)
    assert not cut.is_waiting({"a", "b"}, now=105.0)
    assert (cut.answered, cut.late) == (("a",), ("b",))


def test_an_outage_restarts_the_deadline() -> None:
    cut = a_cut()
    cut.restart_deadline(now=10_000.0)
    assert cut.is_waiting({"a"}, now=10_004.9)
    assert not cut.is_waiting({"a"}, now=10_005.0)


def test_an_answer_to_an_earlier_cut_does_not_count() -> None:
    cut = a_cut()
    assert not cut.take(reached("a", 6, {0: 99}))
    assert not cut.take(reached("a", 8, {0: 99}))
    assert cut.is_waiting({"a"}, now=101.0)
    assert cut.positions == {}


def test_a_cut_waits_for_new_workers_and_not_for_silent_ones() -> None:
    cut = a_cut()
    cut.take(reached("a", 7))
    assert not cut.is_waiting({"a"}, now=100.5)
    assert cut.is_waiting({"a", "new"}, now=101.0)
    assert not cut.is_waiting({"a"}, now=102.0)
    assert (cut.answered, cut.late) == (("a",), ("new",))


def test_a_cut_without_workers_is_over_at_once() -> None:
    cut = a_cut()
    assert not cut.is_waiting(frozenset(), now=100.0)
    assert (cut.workers, cut.late) == ((), ())


def test_an_answer_of_an_unknown_worker_counts() -> None:
    cut = a_cut()
    cut.take(reached("unknown", 7, {1: 4}))
    assert cut.workers == cut.answered == ("unknown",)
    assert cut.positions == {1: 4}


def test_positions_are_the_greatest_of_all_answers_in_any_order() -> None:
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


def test_cut_numbers_continue_after_the_last_one_on_the_log() -> None:
    control = [
        VersionPublished("test", Version(0), "d", 0.0),
        CutRequested("test", 1, Version(0), 5.0),
        CutReleased("test", 1),
        CutRequested("test", 2, Version(0), 5.0),
        VersionPublished("test", Version(1), "d", 0.0),
    ]
    assert next_number(control) == 3
    assert next_number(control[:1]) == 1
