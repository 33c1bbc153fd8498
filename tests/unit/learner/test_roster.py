"""Who is alive: whoever was heard of lately, of whatever kind the record was."""

import pytest

from common.messages import FromWorker, VersionApplied
from common.versions import Version
from services.learner.roster import ROSTER_S, Roster
from tests.interrupted import alive, reached

APPLIED = VersionApplied("test", "a", Version(3), "d", False, 0.5, 0.1, 4)


@pytest.mark.parametrize("message", [alive("a", 3), APPLIED, reached("a", 7)])
def test_any_record_counts_for_so_long_and_no_longer(message: FromWorker) -> None:
    roster = Roster()
    roster.heard(message, now=50.0)
    assert roster.alive(now=50.0) == {"a"}
    assert roster.alive(now=50.0 + ROSTER_S) == {"a"}
    assert roster.alive(now=50.0 + ROSTER_S + 0.01) == frozenset()


def test_who_is_heard_of_again_is_alive_again() -> None:
    roster = Roster()
    roster.heard(alive("a"), now=0.0)
    roster.heard(alive("b"), now=8.0)
    assert roster.alive(now=12.0) == {"b"}
    roster.heard(alive("a"), now=13.0)
    assert roster.alive(now=14.0) == {"a", "b"}


def test_a_worker_without_a_version_has_sampled_nothing_so_nobody_waits_for_it() -> None:
    roster = Roster()
    roster.heard(alive("a", 3), now=0.0)
    roster.heard(alive("a", -1), now=1.0)  # a new process under the old name
    assert roster.alive(now=1.0) == frozenset()
    roster.heard(APPLIED, now=2.0)
    assert roster.alive(now=2.0) == {"a"}
