"""The state of the live view, computed from the status of the services."""

import pytest

from palimpsest.common.messages import VersionApplied
from palimpsest.common.versions import Version
from palimpsest.services.live.history_tail import accumulate
from palimpsest.services.live.poller import RunObservation, ServiceObservation, StatusReply
from palimpsest.services.live.state import Plan, State, ready_at, state
from palimpsest.services.local.exit_reasons import Crash
from tests.records.history_lines import a_line, learner, servers, worker

PLAN = Plan("t", versions=10)


def state_of(sight: RunObservation, **more: object) -> State:
    return state(PLAN, sight, now=101.0, started=1.0, **more)  # type: ignore[arg-type]


def activities(shown: State) -> dict[str, str]:
    return {service.name: service.doing for service in shown.services}


def test_the_estimate_uses_the_pace_since_the_last_start():
    lines = [a_line(0, seconds=30.0), a_line(1, seconds=90.0, phases={"wait": 50.0, "train": 1.0})]
    lines += [a_line(2, seconds=92.0), a_line(3, seconds=94.0)]
    shown = state_of(RunObservation(servers() | {"learner": learner()}, accumulate(lines)))
    assert shown.left_s == pytest.approx(6 * 2.0)
    assert shown.learner_tokens_per_s == pytest.approx(20 / 4.0)
    assert shown.trained_versions == 4


def test_the_first_version_gives_no_estimate():
    first = a_line(0, phases={"wait": 30.0, "train": 1.0})
    assert state_of(RunObservation({"learner": learner()}, accumulate((first,)))).left_s is None
    assert state_of(RunObservation({"learner": learner()})).learner_tokens_per_s is None


def test_the_sampling_rate_is_the_sum_over_workers():
    one = worker(at=100.0, sampled_tokens=1500, earlier=worker(at=90.0, sampled_tokens=1000))
    two = worker(at=100.0, sampled_tokens=900, earlier=worker(at=95.0, sampled_tokens=800))
    shown = state_of(RunObservation({"learner": learner(), "worker-0": one, "worker-1": two}))
    assert shown.rollout_tokens_per_s == pytest.approx(50.0 + 20.0)
    assert shown.in_flight == 24


def test_a_restarted_worker_has_no_negative_rate():
    restarted = worker(at=100.0, sampled_tokens=10, earlier=worker(at=90.0, sampled_tokens=1000))
    assert state_of(RunObservation({"worker-0": restarted})).rollout_tokens_per_s is None


def test_an_exited_worker_has_nothing_in_flight():
    exited = worker(trouble="ConnectError")
    shown = state_of(RunObservation({"learner": learner(), "worker-0": exited}))
    assert shown.in_flight == 0
    assert activities(shown)["worker-0"] == "its process exited"


def test_a_restart_is_shown_after_it_is_decided():
    exited = {"worker-0": worker(at=100.0, trouble="ConnectError")}
    before, after = Crash("worker-0", 90.0, 1, "E: x"), Crash("worker-0", 101.0, 1, "E: x")
    assert activities(state_of(RunObservation(exited), crashes=[before]))["worker-0"] == "its process exited"
    assert (
        activities(state_of(RunObservation(exited), crashes=[before, after]))["worker-0"]
        == "its process exited; restarting it"
    )


def test_a_process_that_waits_for_its_restart_shows_the_seconds():
    services = {"learner": learner(), "worker-0": worker(trouble="ConnectError"), "worker-1": ServiceObservation()}
    shown = state_of(RunObservation(services), starts_again_in={"worker-0": 2.2, "worker-1": 0.0})
    assert (activities(shown)["worker-0"], activities(shown)["worker-1"]) == ("restarts in 3 s", "restarts in 0 s")
    assert activities(shown)["learner"] == "trains on the batch at version 5"


def test_a_service_that_does_not_answer_keeps_its_last_value_and_is_reported_after_a_while():
    shown = state_of(RunObservation({"learner": learner(at=100.0, trouble="ReadTimeout")}))
    assert (activities(shown)["learner"], shown.warnings) == ("trains on the batch at version 5", ())
    shown = state_of(RunObservation({"learner": learner(at=80.0, trouble="ReadTimeout")}))
    assert activities(shown)["learner"] == "trains on the batch at version 5 (21 s ago)"
    assert shown.warnings == ("learner has not answered for 21 s",)
    assert shown.waiting == 7


def test_each_service_shows_its_activity():
    services = servers() | {
        "learner": learner(waiting_for="trajectories: 3 of 32 groups are complete"),
        "worker-0": worker(waiting_for="the engine", seconds=0.0),
        "worker-1": ServiceObservation(),
    }
    shown = state_of(RunObservation(services))
    assert activities(shown) == {
        "snapshot_store": "holds 6 versions, 1.0 MiB",
        "env_gateway": "runs the environments",
        "learner": "waits for trajectories: 3 of 32 groups are complete",
        "worker-0": "waits for the engine",
        "worker-1": "starting its process",
    }
    assert shown.setup
    assert not state_of(RunObservation({"worker-0": worker()})).setup


def test_a_replica_does_not_count_as_a_worker():
    scoring = ServiceObservation(
        StatusReply(100.0, {"version": 3, "waiting": 21, "scored_tokens": 900, "waiting_for": None})
    )
    services = {"learner": learner(), "worker-0": worker(seconds=0.0, live=0, waiting_for="the engine")}
    services |= {
        "replica-0": scoring,
        "replica-1": ServiceObservation(),
        "replica-2": ServiceObservation(scoring.last, trouble="ConnectError"),
    }
    plan = Plan("t", versions=10, replicas=frozenset({"replica-0", "replica-1", "replica-2"}))
    shown = state(plan, RunObservation(services), now=130.0, started=1.0)
    assert activities(shown)["replica-0"] == "scores, 21 trajectories waiting (30 s ago)"
    assert activities(shown)["replica-1"] == "starting its process"
    assert activities(shown)["replica-2"] == "its process exited"
    assert (shown.setup, shown.in_flight, shown.rollout_tokens_per_s) == (True, 0, None)
    assert "replica-0 has not answered for 30 s" in shown.warnings


def test_the_first_worker_that_can_sample_ends_the_setup():
    services = {
        "worker-0": worker(at=100.0, seconds=4.0),
        "worker-1": worker(at=100.0, seconds=7.5),
        "x": ServiceObservation(),
    }
    assert ready_at(RunObservation(services)) == pytest.approx(92.5)
    assert ready_at(RunObservation({"worker-0": worker(seconds=0.0)})) is None


def test_warnings_name_each_problem():
    ledger = {"offered": 9, "trained": 2, "dropped": {"deadline": 2, "engine_failed": 1}, "dead_lettered": 1}
    refused = VersionApplied(
        run="t", worker="worker-0", version=Version(3), digest="", accepted=False, canary_error=0.15, pause_s=0.1,
        live=0,
    )  # fmt: skip
    lines = (a_line(0, skipped=1), a_line(1, exact=False, proximal="ewma_prox"))
    shown = state_of(
        RunObservation({"learner": learner(trajectories=ledger)}, accumulate(lines), (refused,)),
        crashes=[killed := Crash("worker-0", at=61.0, exit_code=-9, words="RuntimeError: gone")],
    )  # fmt: skip
    assert shown.warnings == (
        "worker-0 refused version 3: canary error 0.15 nats, reason in its log",
        killed.to_text("1 min 0 s"),
        "dropped 3 trajectories: 2 deadline, 1 engine_failed",
        "1 dead-lettered: for the reasons, run `palimpsest dead-letters list` with the run's file",
        "skipped 1 optimizer step: the gradient was not finite",
        "the proximal is ewma_prox, a surrogate: its correction and update are not discrepancy and staleness ratio",
    )


def test_a_finished_run_has_no_warnings_about_silent_services():
    services = {
        "learner": learner(at=50.0, trouble="ConnectError"),
        "worker-0": worker(at=50.0, trouble="ConnectError"),
    }
    shown = state_of(RunObservation(services, accumulate(a_line(i) for i in range(10))))
    assert shown.warnings == ()
    assert activities(shown)["learner"] == "ended"


def test_alerts_of_the_newest_version_are_warnings_and_notices_are_not():
    alert = {"rule": "clip_idle", "level": "warning", "value": 0.0, "says": "the clip takes nothing"}
    notice = {"rule": "discrepancy_is_one", "level": "notice", "value": 1.0, "says": "as configured"}
    over = a_line(0, alerts=[alert | {"says": "long over"}])
    shown = state_of(RunObservation({"learner": learner()}, accumulate((over, a_line(1, alerts=[alert, notice])))))
    assert shown.warnings == ("clip_idle: the clip takes nothing",)
    assert state_of(RunObservation({"learner": learner()}, accumulate((over, a_line(1))))).warnings == ()


def test_a_person_may_change_the_number_of_versions():
    sight = RunObservation(servers() | {"learner": learner(versions=30)}, accumulate([a_line(0)]))
    assert state(PLAN, sight, now=101.0, started=1.0).plan.versions == 30
