"""Worker liveness: a worker is alive if it published any record recently."""

import pytest

from palimpsest.common.messages import FromWorker, VersionApplied
from palimpsest.common.versions import Version
from palimpsest.services.learner.old_logprobs.interruption.liveness import ALIVE_S, WorkerLiveness
from tests.learner_parts.interruption import alive, reached

APPLIED = VersionApplied("test", "a", Version(3), "d", False, 0.5, 0.1, 4)


@pytest.mark.parametrize("message", [alive("a", 3), APPLIED, reached("a", 7)])
def test_any_record_keeps_a_worker_alive_for_a_limited_time(message: FromWorker) -> None:
    liveness = WorkerLiveness()
    liveness.record_heartbeat(message, now=50.0)
    assert liveness.alive(now=50.0) == {"a"}
    assert liveness.alive(now=50.0 + ALIVE_S) == {"a"}
    assert liveness.alive(now=50.0 + ALIVE_S + 0.01) == frozenset()


def test_a_new_record_makes_a_worker_alive_again() -> None:
    liveness = WorkerLiveness()
    liveness.record_heartbeat(alive("a"), now=0.0)
    for now in (4.0, 8.0):
        liveness.record_heartbeat(alive("b"), now=now)
    assert liveness.alive(now=12.0) == {"b"}
    liveness.record_heartbeat(alive("a"), now=12.5)
    assert liveness.alive(now=14.0) == {"a", "b"}


def test_an_outage_does_not_count_as_silence() -> None:
    """The outage lasts from 3 to 63; the record of "b" is read first after it."""
    liveness = WorkerLiveness()
    liveness.record_heartbeat(alive("a"), now=1.0)
    liveness.record_heartbeat(alive("b"), now=2.0)
    liveness.record_heartbeat(alive("b"), now=63.0)
    liveness.discount_outage(61.0, now=63.0)
    assert liveness.alive(now=63.0) == {"a", "b"}
    assert liveness.alive(now=72.0) == {"a", "b"}, "1 + 61 + 10"
    assert liveness.alive(now=72.1) == {"b"}
    assert liveness.alive(now=73.1) == frozenset(), "what was read after the outage is not dated forward"


def test_a_worker_without_a_version_is_not_waited_for() -> None:
    liveness = WorkerLiveness()
    liveness.record_heartbeat(alive("a", 3), now=0.0)
    liveness.record_heartbeat(alive("a", -1), now=1.0)  # a new process with the same worker name
    assert liveness.alive(now=1.0) == frozenset()
    liveness.record_heartbeat(APPLIED, now=2.0)
    assert liveness.alive(now=2.0) == {"a"}
