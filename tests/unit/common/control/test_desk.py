"""The queue of changes: order, repeated requests, limits, and changes that a later one replaces."""

from typing import Any

import pytest

from palimpsest.common.control.changes import Caller, Change, ChangeState
from palimpsest.common.control.desk import CHANGES_PER_S, MOST_KEPT, MOST_REQUESTED, ControlDesk
from palimpsest.common.control.errors import HttpError

ANN = Caller("ann", "tune", "10.0.0.1")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5  # two changes a second, below the limit
        return self.now


@pytest.fixture
def desk() -> ControlDesk:
    return ControlDesk("a-", clock=Clock())


def lr(desk: ControlDesk, value: float, **options: Any) -> Change:
    return desk.submit("settings", {"learner.optimizer.lr": value}, ANN, applies_from="next version", **options)


def refusal(desk: ControlDesk, value: float = 1.0, **options: Any) -> tuple[int, str]:
    with pytest.raises(HttpError) as raised:
        lr(desk, value, **options)
    return raised.value.status, raised.value.body["code"]


def test_changes_are_taken_once_in_their_order(desk: ControlDesk) -> None:
    first = desk.submit("pause", {"what": "offers"}, ANN, applies_from="")
    second = lr(desk, 1e-5)
    assert desk.has_requests
    assert desk.take() == [first, second]
    assert desk.take() == []
    assert not desk.has_requests
    assert [first.id, second.id] == ["a-1", "a-2"]


def test_a_finished_change_keeps_its_state(desk: ControlDesk) -> None:
    change = lr(desk, 1e-5)
    desk.take()
    desk.finish(change, ChangeState.APPLIED, version=7, before={"learner.optimizer.lr": 1e-6})
    seen = desk.get(change.id)
    assert (seen.state, seen.version, seen.before, seen.is_finished) == (
        "applied",
        7,
        {"learner.optimizer.lr": 1e-6},
        True,
    )


def test_a_later_change_of_the_same_keys_supersedes_one_that_waits(desk: ControlDesk) -> None:
    first, second = lr(desk, 1e-5), lr(desk, 2e-5)
    assert desk.get(first.id).state == "superseded"
    assert desk.take() == [second]


def test_a_change_that_sets_further_keys_is_not_superseded(desk: ControlDesk) -> None:
    both = desk.submit("settings", {"learner.optimizer.lr": 1e-5, "learner.versions": 9}, ANN, applies_from="")
    second = lr(desk, 2e-5)
    assert desk.take() == [both, second]


def test_a_change_that_the_loop_has_taken_is_not_superseded(desk: ControlDesk) -> None:
    first = lr(desk, 1e-5)
    desk.take()
    lr(desk, 2e-5)
    assert desk.get(first.id).state == "requested"


def test_a_repeated_request_returns_its_first_change(desk: ControlDesk) -> None:
    first = lr(desk, 1e-5, key="k")
    assert lr(desk, 1e-5, key="k") == first
    assert desk.take() == [first]


def test_a_key_of_another_request_is_a_conflict(desk: ControlDesk) -> None:
    lr(desk, 1e-5, key="k")
    assert refusal(desk, 2e-5, key="k") == (409, "key_conflict")


def test_more_than_ten_changes_in_a_second_are_refused() -> None:
    desk = ControlDesk("a-", clock=lambda: 5.0)
    for number in range(CHANGES_PER_S):
        desk.submit("pause", {"what": str(number)}, ANN, applies_from="")
    assert refusal(desk) == (429, "too_many_changes")


def test_the_queue_is_bounded(desk: ControlDesk) -> None:
    for number in range(MOST_REQUESTED):
        desk.submit("pause", {"what": str(number)}, ANN, applies_from="")
    assert refusal(desk) == (429, "too_many_changes")


def test_old_finished_changes_and_their_keys_are_forgotten(desk: ControlDesk) -> None:
    first = lr(desk, 0.0, key="first")
    for number in range(1, MOST_KEPT + 1):
        lr(desk, float(number))
        desk.take()
    assert len(desk.changes(10_000)) <= MOST_KEPT + 1
    with pytest.raises(HttpError, match="no such change"):
        desk.get(first.id)
    assert lr(desk, 5.0, key="first").id != first.id


def test_closing_loses_what_waits_and_what_was_taken(desk: ControlDesk) -> None:
    taken = desk.submit("pause", {"what": "offers"}, ANN, applies_from="")
    desk.take()
    waiting = lr(desk, 1e-5)
    desk.close("fenced", "another learner has the run")
    desk.close("ended", "the learner ends")
    assert [desk.get(change.id).state for change in (taken, waiting)] == ["lost", "lost"]
    assert desk.get(waiting.id).code == "fenced"
    assert refusal(desk) == (409, "fenced")
