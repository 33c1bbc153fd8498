"""Who waits for whom: the learner, its oldest group, the workers, services that do not answer."""

from typing import Any

from palimpsest.common.messages import WorkerAlive
from palimpsest.services.learner.control.waits import SILENT_S, Wait, waits
from palimpsest.services.learner.observability.worker_watch import WorkerStates


def alive(worker: str, *, live: int, version: int = 7) -> WorkerAlive:
    return WorkerAlive("r", worker, version=version, live=live, sampled_tokens=0, seconds=0.0, idle_s=0.0)


def found(now: float = 10.0, **more: Any) -> list[tuple[str, str, str, str, float | None]]:
    options: dict[str, Any] = {"waiting_for": None, "waited_s": None, "status": {}, "workers": {}, "outages": ()}
    made: list[Wait] = waits(**options | more, now=now, unix_now=1000.0)
    return [(one.who, one.does, one.waits_for, one.on, one.seconds) for one in made]


def test_a_learner_trains_or_waits_for_workers_or_people() -> None:
    assert found() == [("learner", "trains", "", "", None)]
    text = "trajectories: 1 of 4 groups are complete"
    assert found(waiting_for=text, waited_s=2.04) == [("learner", "", text, "rollout", 2.0)]
    assert found(waiting_for="resume: ann paused the training", waited_s=1.0)[0][3] == "people"


def test_a_worker_waits_since_its_first_heartbeat_without_trajectories() -> None:
    states = WorkerStates()
    states.observe(alive("w0", live=3), now=4.0)
    assert found(workers=states.states())[1] == ("w0", "samples 3 trajectories with version 7", "", "", None)
    states.observe(alive("w0", live=0), now=6.0)
    states.observe(alive("w0", live=0), now=8.0)
    assert found(workers=states.states())[1] == ("w0", "", "tasks", "learner", 4.0)
    states.observe(alive("w0", live=0, version=-1), now=9.0)
    assert found(workers=states.states())[1][2] == "the first version"
    silent = found(now=9.5 + SILENT_S, workers=states.states())[1]
    assert silent == ("w0", "", "unknown: it sends no heartbeat", "w0", SILENT_S + 0.5)


def test_the_oldest_group_and_outages_are_shown() -> None:
    outage = {"of": "Kafka", "address": "k:9092", "since": 990.0, "until": None, "problem": "refused"}
    assert found(status={"oldest_group": "g000004", "oldest_group_s": 8.0}, outages=[outage])[1:] == [
        ("oldest group g000004", "", "its trajectories, or its turn in a batch", "rollout, learner", 8.0),
        ("learner", "", "Kafka at k:9092 to answer (refused)", "Kafka", 10.0),
    ]
