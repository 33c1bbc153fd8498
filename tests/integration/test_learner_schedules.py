"""A run survives processes that die, pause or are stopped at any failpoint, and leaves what a single learner leaves."""

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from palimpsest.common import failpoints
from palimpsest.common.messages import CONTROL, group_id
from palimpsest.common.snapshots.client import VersionConflict
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.audit.command import run_command
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.evaluation import ledger as evaluation_ledger
from palimpsest.services.learner.ingest.task_publisher import TaskPublisher
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.observability import history
from palimpsest.services.learner.publishing.publishing import Checkpoint, Publishing
from palimpsest.services.rollout.async_consumer import AsyncConsumer
from palimpsest.services.rollout.record_reader import RecordReader
from tests.integration import test_sharded_faults
from tests.runs.run_process import ROOT
from tests.simulation.cut_schedules import LIMIT_S, slow_polling
from tests.simulation.cut_worker import process_name
from tests.simulation.learner_checks import run_and_check
from tests.simulation.learner_faults import ANYWHERE, Fault, FaultKind, configured, places
from tests.simulation.learner_schedules import LearnerSchedule
from tests.simulation.simulated_time import SimulatedLoop, run

pytestmark = pytest.mark.thorough

SHARDS = ("learner.before_shards", "learner.after_shards")
"""Of a policy that is split over ranks; a simulated learner has one rank."""
LEARNERS = [place for place in places() if place.startswith("learner.") and place not in SHARDS]
WORKERS = [place for place in places() if place.startswith("rollout.")]
VISITS = 3
"""A fault occurs at one of the first three visits of its place."""
ENOUGH = 30
"""Runs within which the removal of a mechanism must show; else the runs hardly test it."""
Patch = pytest.MonkeyPatch
CHUNK = 20
CHUNKS = [
    0,
    *(pytest.param(first, marks=pytest.mark.long) for first in range(CHUNK, 400, CHUNK)),
]
"""First seed of each chunk."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> Iterator[None]:
    slow_polling(monkeypatch)
    with structlog.testing.capture_logs():
        yield


def test_every_failpoint_is_tested() -> None:
    replicas = [place for place in places() if place.startswith("replica.")]
    assert {*LEARNERS, *SHARDS, *WORKERS, *replicas} == set(places())
    text = (ROOT / "tests" / "integration" / "test_replica.py").read_text()
    assert all(f'"{place}"' in text for place in replicas)
    assert set(SHARDS) <= set(test_sharded_faults.LEARNERS)


@pytest.mark.parametrize(("place", "kind"), list(zip(LEARNERS, itertools.cycle(FaultKind), strict=False)))
def test_the_run_survives_a_learner_fault_at_every_failpoint(place: str, kind: FaultKind, tmp_path: Path) -> None:
    """One kind of fault for each place; the next test tries all kinds."""
    run_with_fault(tmp_path, 0, learner=Fault(place, 2, kind))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("place", LEARNERS)
def test_the_run_survives_every_kind_of_learner_fault_at_every_failpoint(
    place: str, kind: FaultKind, seed: int, tmp_path: Path
) -> None:
    run_with_fault(tmp_path, seed, learner=Fault(place, 1 + seed % VISITS, kind))


@pytest.mark.parametrize("kind", [FaultKind.DIE, FaultKind.PAUSE])
@pytest.mark.parametrize("place", WORKERS)
def test_the_run_survives_every_kind_of_worker_fault_at_every_failpoint(
    place: str, kind: FaultKind, tmp_path: Path
) -> None:
    run_with_fault(tmp_path, 0, worker=Fault(place, 1, kind))


def test_a_simulated_worker_that_dies_does_not_wait_for_the_log(tmp_path: Path) -> None:
    """Test of the simulation: a living worker waits for its call to return before it ends (reader.py)."""

    async def dies(loop: SimulatedLoop) -> float:
        process_name.set("worker-0.0")
        schedule = LearnerSchedule(loop, random.Random(0), tmp_path, of_worker=Fault("here", 1, FaultKind.DIE))
        schedule.death_signals[process_name.get()] = loop.create_future()
        schedule.silent[process_name.get()] = 10.0
        calling = asyncio.create_task(AsyncConsumer(schedule.bus.consumer(CONTROL)).ends())
        await asyncio.sleep(5.0)
        with pytest.raises(asyncio.CancelledError):
            schedule.reach("here")
        calling.cancel()
        await asyncio.wait({calling})
        return loop.time()

    assert run(dies, lambda: 0.1) < LIMIT_S


def run_with_fault(folder: Path, seed: int, *, learner: Fault | None = None, worker: Fault | None = None) -> None:
    schedule = run_and_check(seed, folder, plan=[] if learner is None else [learner], of_worker=worker)
    for fault in (learner, worker):
        assert fault is None or fault.happened, "the run did not reach the failpoint"
    if learner is not None and learner.kind is FaultKind.PAUSE:
        assert schedule.replaced, "no learner took over"


@pytest.mark.parametrize("first", CHUNKS)
def test_the_run_survives_random_faults_of_successive_learners(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + CHUNK):
        try:
            run_with_random_faults(seed, tmp_path / f"{seed}")
        except BaseException as error:
            error.add_note(
                f"schedule {seed}: run_with_random_faults({seed}, folder) in {Path(__file__).name} repeats it"
            )
            raise


def run_with_random_faults(seed: int, folder: Path) -> LearnerSchedule:
    """A run with faults that the seed determines."""
    folder.mkdir()
    chances = random.Random(f"plan {seed}")

    def fault(places: list[str], kinds: list[FaultKind]) -> Fault:
        return Fault(chances.choice(places), chances.randint(1, VISITS), chances.choice(kinds))

    plan = [fault([*LEARNERS, *LEARNERS, ANYWHERE], list(FaultKind)) for _ in range(chances.randint(1, 5))]
    worker = fault(WORKERS, [FaultKind.DIE, FaultKind.PAUSE]) if chances.random() < 0.5 else None
    return run_and_check(seed, folder, plan=plan, of_worker=worker)


def the_store_accepts_replaced_writers(patch: Patch) -> None:
    patch.setenv(failpoints.VARIABLE, "store.skip_fencing")


def the_learner_does_not_confirm_its_lease(patch: Patch) -> None:
    patch.setattr(Writer, "confirm", lambda self: None)


def a_version_is_announced_before_its_checkpoint(patch: Patch) -> None:
    publish = Publishing.publish

    def published(
        self: Publishing, version: Version, checkpoint: Checkpoint | None, *, now: float, durable: bool = True
    ) -> None:
        publish(self, version, None, now=now, durable=durable)
        if checkpoint is not None:
            self.save(checkpoint)

    patch.setattr(Publishing, "publish", published)


def a_step_changes_no_weight(patch: Patch) -> None:
    patch.setattr(TrainablePolicy, "step", lambda self, *, lr_factor: 0.0)


def records_count_as_done_when_read(patch: Patch) -> None:
    patch.setattr(TrajectoryReader, "offsets", lambda self: self._consumer.positions())


def groups_offered_after_the_checkpoint_are_not_adopted(patch: Patch) -> None:
    patch.setattr(TaskPublisher, "_adopt", lambda self, task_offsets, now: None)


def the_ledger_is_not_restored(patch: Patch) -> None:
    patch.setattr(TrajectoryLedger, "restore", lambda self, state, *, now: None)


def the_history_is_not_truncated(patch: Patch) -> None:
    patch.setattr(history, "_first", lambda path, length: path.read_bytes() if path.exists() else b"")


DEATHS: Mapping[Callable[[Patch], None], Fault] = {
    the_store_accepts_replaced_writers: Fault("learner.after_step", 2, FaultKind.PAUSE),
    the_learner_does_not_confirm_its_lease: Fault("learner.before_announcing", 2, FaultKind.PAUSE),
    # The first version: the evaluation keeps workers at version 0, and later batches are too old to be trained again.
    a_version_is_announced_before_its_checkpoint: Fault("learner.after_publishing", 1, FaultKind.DIE),
    a_step_changes_no_weight: Fault("learner.after_publishing", 1, FaultKind.DIE),
    records_count_as_done_when_read: Fault("learner.before_reading", 2, FaultKind.DIE),
    groups_offered_after_the_checkpoint_are_not_adopted: Fault("learner.before_reading", 2, FaultKind.DIE),
    the_ledger_is_not_restored: Fault("learner.after_publishing", 2, FaultKind.DIE),
    the_history_is_not_truncated: Fault("learner.inside_checkpoint", 2, FaultKind.DIE),
}


@pytest.mark.parametrize("without", DEATHS, ids=lambda without: without.__name__)
def test_removing_a_mechanism_makes_a_run_fail(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises((AssertionError, TimeoutError, VersionConflict)):
        run_all(tmp_path, DEATHS[without])


def test_the_audit_finds_an_evaluation_that_is_trained_on(tmp_path: Path, monkeypatch: Patch) -> None:
    """Without ids of their own, trajectories of evaluations enter the ledger of the training."""
    monkeypatch.setattr(evaluation_ledger, "evaluation_group", lambda version, number: group_id(number))
    monkeypatch.setattr(RecordReader, "_check_samples", lambda self, offer: None)
    with pytest.raises(AssertionError):
        run_and_check(0, tmp_path)
    report = json.loads(run_command([str(configured(tmp_path).run.home), "--json"], {}).text)
    assert "evaluation_trained" in {finding["kind"] for finding in report["findings"]}


def run_all(folder: Path, fault: Fault) -> None:
    for seed in range(ENOUGH):
        (folder / f"{seed}").mkdir()
        run_and_check(seed, folder / f"{seed}", plan=[replace(fault)])
