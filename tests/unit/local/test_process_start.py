"""The time when a process became ready, and whether it did work."""

import pytest

from palimpsest.services.live.poller import ServiceObservation, StatusReply
from palimpsest.services.local.process_start import STEADY_S, ProcessStart

STARTED = 100.0


def answer(service: str, *, at: float = STARTED + 1, **status: object) -> ServiceObservation:
    return ServiceObservation(StatusReply(at, {"service": service, "waiting_for": None, **status}))


READY = {
    "snapshot_store": answer("snapshot_store"),
    "env_gateway": answer("env_gateway"),
    "rollout": answer("rollout", sampled_tokens=1),
    "replica": answer("replica", scored_tokens=1),
    "learner": answer("learner", waiting_for="trajectories: 0 of 4 groups are complete"),
}
NOT_READY = {
    "no answer": ServiceObservation(trouble="ConnectError"),
    "an answer of the earlier process": answer("snapshot_store", at=STARTED - 1),
    "the engine starts": answer("rollout", waiting_for="the engine", sampled_tokens=0),
    "the engine got no request": answer("rollout", waiting_for="tasks", sampled_tokens=0),
    "the replica loads": answer("replica", waiting_for="the model", scored_tokens=0),
    "the replica has scored nothing": answer("replica", scored_tokens=0),
}


@pytest.mark.parametrize("service", READY)
def test_a_process_that_is_ready_at_a_new_version_has_worked(service: str) -> None:
    life = ProcessStart(STARTED, versions=7, trains=service == "learner")
    life.observe(READY[service], versions=7, now=STARTED + 2)
    assert (life.ready, life.worked) == (STARTED + 2, False)
    life.observe(READY[service], versions=8, now=STARTED + 3)
    assert (life.ready, life.worked) == (STARTED + 2, True)


@pytest.mark.parametrize("name", NOT_READY)
def test_a_long_startup_is_not_work(name: str) -> None:
    life = ProcessStart(STARTED, versions=7)
    life.observe(NOT_READY[name], versions=50, now=STARTED + 100 * STEADY_S)
    assert (life.ready, life.worked) == (None, False)


@pytest.mark.parametrize("service", READY)
def test_staying_up_is_work_for_all_but_the_learner(service: str) -> None:
    life = ProcessStart(STARTED, versions=7, trains=service == "learner")
    for now in (STARTED + 2, STARTED + 2 + STEADY_S):
        life.observe(READY[service], versions=7, now=now)
    assert life.worked is (service != "learner")


def test_a_version_is_the_learners_work_even_if_its_answers_were_missed() -> None:
    life = ProcessStart(STARTED, versions=7, trains=True)
    life.observe(ServiceObservation(), versions=8, now=STARTED + 2)
    assert life.worked


def test_versions_trained_again_after_a_checkpoint_are_not_work() -> None:
    life = ProcessStart(STARTED, versions=7, trains=True)
    for versions in (5, 6, 7):
        life.observe(READY["learner"], versions=versions, now=STARTED + versions)
    assert not life.worked


def test_a_service_that_is_loading_is_not_ready() -> None:
    for service in ("learner", "rollout", "snapshot_store"):
        life = ProcessStart(STARTED, versions=0)
        life.observe(answer(service, starting=True, waiting_for="the model to be loaded"), versions=0, now=STARTED + 2)
        assert life.ready is None
