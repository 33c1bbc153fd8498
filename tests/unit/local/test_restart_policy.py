"""Which exits of a process lead to a restart, and after how many seconds."""

import pytest

from palimpsest.services.local.restart_policy import LONGEST_WAIT_S, Death, append_death, is_crash_loop, restart_delay_s

KILLED, RAISED, OTHER = Death(-9, "", False), Death(1, "ValueError: no", False), Death(1, "OSError: no", False)
WORKED = Death(-9, "", True)


def outcome(*deaths: Death, restarts: int = 5) -> float | None:
    row: tuple[Death, ...] = ()
    for death in deaths:
        row = append_death(row, death)
    return restart_delay_s(row, restarts=restarts)


@pytest.mark.parametrize(
    ("deaths", "restarts", "waits"),
    [
        ([KILLED], 5, 0.0),
        ([KILLED, KILLED], 5, 1.0),
        ([KILLED, KILLED, KILLED], 99, None),
        ([KILLED, RAISED, OTHER], 5, 2.0),
        ([KILLED, RAISED, KILLED, RAISED, KILLED], 5, 8.0),
        ([KILLED, RAISED, KILLED, RAISED, KILLED, RAISED], 5, None),
        ([RAISED, KILLED, KILLED, KILLED], 99, None),
        ([KILLED] * 2 + [WORKED], 5, 0.0),
        ([KILLED] * 2 + [WORKED, KILLED], 5, 1.0),
        ([KILLED] * 2 + [WORKED, KILLED, KILLED], 99, None),
        ([WORKED] * 100, 5, 0.0),
        ([KILLED], 0, None),
        ([KILLED, OTHER], 1, None),
        ([KILLED, RAISED] * 10, 99, LONGEST_WAIT_S),
    ],
)
def test_the_delay_after_a_series_of_deaths(deaths: list[Death], restarts: int, waits: float | None) -> None:
    assert outcome(*deaths, restarts=restarts) == waits


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Death(1, "OSError: port 4711 at 0x7ffe", False), Death(1, "OSError: port 9 at 0x1", False), True),
        (Death(1, "ValueError: no", False), Death(1, "ValueError: yes", False), False),
        (Death(-9, "", False), Death(-11, "", False), False),
        (Death(-9, "", True), Death(-9, "", False), True),
    ],
)
def test_two_deaths_are_the_same_failure_without_their_numbers(one: Death, other: Death, same: bool) -> None:
    assert one.is_same_failure(other) is same
    assert is_crash_loop([one, other, one]) is same


def test_every_series_of_deaths_without_work_ends() -> None:
    """At most `restarts` restarts follow, for any kind of death."""
    for restarts in range(8):
        row: tuple[Death, ...] = ()
        starts = 1
        while (
            restart_delay_s(row := append_death(row, Death(1, "ab"[starts % 2], False)), restarts=restarts) is not None
        ):
            starts += 1
        assert starts == restarts + 1
