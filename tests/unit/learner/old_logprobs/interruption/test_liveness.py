"""Who is alive: whoever was heard of lately, of whatever kind the record was."""

import pytest

from palimpsest.common.messages import FromWorker, VersionApplied
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.interruption.liveness import ROSTER_S, WorkerLiveness
from tests.interrupted import alive, reached

APPLIED = VersionApplied("test", "a", Version(3), "d", False, 0.5, 0.1, 4)


@pytest.mark.parametrize("message", [alive("a", 3), APPLIED, reached("a", 7)])
def test_any_record_counts_for_so_long_and_no_longer(message: FromWorker) -> None:
    roster = WorkerLiveness()
    roster.record_heartbeat(message, now=50.0)
    assert roster.alive(now=50.0) == {"a"}
    assert roster.alive(now=50.0 + ROSTER_S) == {"a"}
    assert roster.alive(now=50.0 + ROSTER_S + 0.01) == frozenset()


def test_who_is_heard_of_again_is_alive_again() -> None:
    roster = WorkerLiveness()
    roster.record_heartbeat(alive("a"), now=0.0)
    for now in (4.0, 8.0):
        roster.record_heartbeat(alive("b"), now=now)
    assert roster.alive(now=12.0) == {"b"}
    roster.record_heartbeat(alive("a"), now=12.5)
    assert roster.alive(now=14.0) == {"a", "b"}


def test_while_nobody_is_heard_of_nobody_is_taken_for_dead() -> None:
    """An outage of the log from 3 to 63, after which "b" comes through first."""
    roster = WorkerLiveness()
    roster.record_heartbeat(alive("a"), now=1.0)
    roster.record_heartbeat(alive("b"), now=2.0)
    roster.record_heartbeat(alive("b"), now=63.0)  # 61 s of silence
    assert roster.alive(now=63.0) == {"a", "b"}
    roster.record_heartbeat(alive("b"), now=66.0)
    roster.record_heartbeat(alive("b"), now=70.0)
    assert roster.alive(now=72.0) == {"a", "b"}, "9 s after the log was well again: 2 + 61 + 9"
    assert roster.alive(now=72.1) == {"b"}


def test_a_silence_of_all_is_excused_before_anybody_is_heard_again() -> None:
    roster = WorkerLiveness()
    roster.record_heartbeat(alive("a"), now=1.0)
    roster.discount_silence(now=5.9)
    assert roster.alive(now=11.0) == {"a"}
    assert roster.alive(now=11.1) == frozenset(), "4.9 s without a record are nothing unusual"
    roster.record_heartbeat(alive("a"), now=20.0)
    roster.discount_silence(now=80.0)
    assert roster.alive(now=90.0) == {"a"}
    assert roster.alive(now=90.1) == frozenset()


def test_silence_on_a_log_that_is_known_to_be_well_is_the_workers() -> None:
    roster = WorkerLiveness()
    roster.record_heartbeat(alive("a"), now=1.0)
    for now in (4.0, 7.0, 10.0):
        roster.listened(now=now)
    roster.discount_silence(now=11.1)
    assert roster.alive(now=11.1) == frozenset()


def test_a_worker_without_a_version_has_sampled_nothing_so_nobody_waits_for_it() -> None:
    roster = WorkerLiveness()
    roster.record_heartbeat(alive("a", 3), now=0.0)
    roster.record_heartbeat(alive("a", -1), now=1.0)  # a new process under the old name
    assert roster.alive(now=1.0) == frozenset()
    roster.record_heartbeat(APPLIED, now=2.0)
    assert roster.alive(now=2.0) == {"a"}
