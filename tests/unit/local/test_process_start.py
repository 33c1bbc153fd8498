"""When a process became ready, and whether it has worked."""

import pytest

from palimpsest.services.live.poller import Answer, ServiceObservation
from palimpsest.services.local.process_start import STEADY_S, Life

STARTED = 100.0


def said(service: str, *, at: float = STARTED + 1, **status: object) -> ServiceObservation:
    return ServiceObservation(Answer(at, {"service": service, "waiting_for": None, **status}))


READY = {
    "snapshot_store": said("snapshot_store"),
    "env_gateway": said("env_gateway"),
    "rollout": said("rollout", sampled_tokens=1),
    "replica": said("replica", scored_tokens=1),
    "learner": said("learner", waiting_for="trajectories: 0 of 4 groups are complete"),
}
NOT_READY = {
    "nobody answers": ServiceObservation(trouble="ConnectError"),
    "the process before answered": said("snapshot_store", at=STARTED - 1),
    "the engine starts": said("rollout", waiting_for="the engine", sampled_tokens=0),
    "the engine was never asked": said("rollout", waiting_for="tasks", sampled_tokens=0),
    "the replica loads": said("replica", waiting_for="the model", scored_tokens=0),
    "the replica has scored nothing": said("replica", scored_tokens=0),
}


@pytest.mark.parametrize("service", READY)
def test_a_process_that_was_ready_when_a_version_came_has_worked(service: str) -> None:
    life = Life(STARTED, versions=7, trains=service == "learner")
    life.saw(READY[service], versions=7, now=STARTED + 2)
    assert (life.ready, life.worked) == (STARTED + 2, False)
    life.saw(READY[service], versions=8, now=STARTED + 3)
    assert (life.ready, life.worked) == (STARTED + 2, True)


@pytest.mark.parametrize("name", NOT_READY)
def test_no_start_up_however_long_is_work(name: str) -> None:
    life = Life(STARTED, versions=7)
    life.saw(NOT_READY[name], versions=50, now=STARTED + 100 * STEADY_S)
    assert (life.ready, life.worked) == (None, False)


@pytest.mark.parametrize("service", READY)
def test_staying_up_is_work_for_all_but_the_learner(service: str) -> None:
    life = Life(STARTED, versions=7, trains=service == "learner")
    for now in (STARTED + 2, STARTED + 2 + STEADY_S):
        life.saw(READY[service], versions=7, now=now)
    assert life.worked is (service != "learner")


def test_a_version_is_the_learners_work_even_if_its_answers_were_missed() -> None:
    life = Life(STARTED, versions=7, trains=True)
    life.saw(ServiceObservation(), versions=8, now=STARTED + 2)
    assert life.worked


def test_versions_that_are_trained_again_after_a_checkpoint_are_none_more() -> None:
    life = Life(STARTED, versions=7, trains=True)
    for versions in (5, 6, 7):
        life.saw(READY["learner"], versions=versions, now=STARTED + versions)
    assert not life.worked


def test_a_service_that_only_says_what_it_loads_is_not_ready() -> None:
    for service in ("learner", "rollout", "snapshot_store"):
        life = Life(STARTED, versions=0)
        life.saw(said(service, starting=True, waiting_for="the model to be loaded"), versions=0, now=STARTED + 2)
        assert life.ready is None
