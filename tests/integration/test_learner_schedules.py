"""Wherever a process dies, stands still or is stopped, the run goes on, and what is left is what one learner leaves."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from palimpsest.common import failpoints
from palimpsest.common.messages import CONTROL
from palimpsest.common.snapshots.writer import Writer
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.task_publisher import TaskPublisher
from palimpsest.services.learner.ingest.trajectory_reader import TrajectoryReader
from palimpsest.services.learner.loop import Loop
from palimpsest.services.learner.observability import history
from palimpsest.services.rollout.async_consumer import AsyncConsumer
from tests.runs.run_process import ROOT
from tests.simulation.cut_schedules import LIMIT_S, life, make_rare
from tests.simulation.learner_faults import ANYWHERE, Fault, How, places
from tests.simulation.learner_judge import judged
from tests.simulation.learner_schedules import LearnerSchedule
from tests.simulation.simulated_time import SimulatedLoop, run

pytestmark = pytest.mark.thorough

LEARNERS = [place for place in places() if place.startswith("learner.")]
WORKERS = [place for place in places() if place.startswith("rollout.")]
VISITS = 3
"""A fault comes at one of the first so many visits of its place."""
ENOUGH = 30
"""A mechanism whose lack shows in none of so many runs would hardly be tried by the others."""
Patch = pytest.MonkeyPatch
CHUNK = 20
CHUNKS = [
    0,
    *(pytest.param(first, marks=pytest.mark.long) for first in range(CHUNK, 400, CHUNK)),
]
"""The first seed of each."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> Iterator[None]:
    make_rare(monkeypatch)
    with structlog.testing.capture_logs():
        yield


def test_every_place_is_tried() -> None:
    replicas = [place for place in places() if place.startswith("replica.")]
    assert {*LEARNERS, *WORKERS, *replicas} == set(places())
    text = (ROOT / "tests" / "integration" / "test_replica.py").read_text()
    assert all(f'"{place}"' in text for place in replicas)


@pytest.mark.parametrize(("place", "how"), list(zip(LEARNERS, itertools.cycle(How), strict=False)))
def test_a_learner_meets_something_anywhere(place: str, how: How, tmp_path: Path) -> None:
    """One of the three for each place; all of them below."""
    meets(tmp_path, 0, learner=Fault(place, 2, how))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("how", How)
@pytest.mark.parametrize("place", LEARNERS)
def test_a_learner_that_dies_stands_still_or_is_stopped_costs_time_only(
    place: str, how: How, seed: int, tmp_path: Path
) -> None:
    meets(tmp_path, seed, learner=Fault(place, 1 + seed % VISITS, how))


@pytest.mark.parametrize("how", [How.DIES, How.STANDS_STILL])
@pytest.mark.parametrize("place", WORKERS)
def test_a_worker_that_dies_or_is_not_heard_of_costs_time_only(place: str, how: How, tmp_path: Path) -> None:
    meets(tmp_path, 0, worker=Fault(place, 1, how))


def test_a_worker_that_dies_does_not_wait_for_the_log(tmp_path: Path) -> None:
    """Of the simulation: a worker that lives waits for its call to return before it ends (reader.py)."""

    async def dies(loop: SimulatedLoop) -> float:
        life.set("worker-0.0")
        schedule = LearnerSchedule(loop, random.Random(0), tmp_path, of_worker=Fault("here", 1, How.DIES))
        schedule.falls[life.get()] = loop.create_future()
        schedule.silent[life.get()] = 10.0
        calling = asyncio.create_task(AsyncConsumer(schedule.bus.consumer(CONTROL)).ends())
        await asyncio.sleep(5.0)
        with pytest.raises(asyncio.CancelledError):
            schedule.reach("here")
        calling.cancel()
        await asyncio.wait({calling})
        return loop.time()

    assert run(dies, lambda: 0.1) < LIMIT_S


def meets(folder: Path, seed: int, *, learner: Fault | None = None, worker: Fault | None = None) -> None:
    schedule = judged(seed, folder, plan=[] if learner is None else [learner], of_worker=worker)
    for fault in (learner, worker):
        assert fault is None or fault.happened, "the place was never reached"
    if learner is not None and learner.how is How.STANDS_STILL:
        assert schedule.replaced, "nobody took over"


@pytest.mark.parametrize("first", CHUNKS)
def test_whatever_befalls_learners_one_after_another(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + CHUNK):
        try:
            by_chance(seed, tmp_path / f"{seed}")
        except BaseException as error:
            error.add_note(f"schedule {seed}: by_chance({seed}, folder) in {Path(__file__).name} repeats it")
            raise


def by_chance(seed: int, folder: Path) -> LearnerSchedule:
    """A run whose seed says what befalls whom."""
    folder.mkdir()
    chances = random.Random(f"plan {seed}")

    def fault(places: list[str], hows: list[How]) -> Fault:
        return Fault(chances.choice(places), chances.randint(1, VISITS), chances.choice(hows))

    plan = [fault([*LEARNERS, *LEARNERS, ANYWHERE], list(How)) for _ in range(chances.randint(1, 5))]
    worker = fault(WORKERS, [How.DIES, How.STANDS_STILL]) if chances.random() < 0.5 else None
    return judged(seed, folder, plan=plan, of_worker=worker)


def the_store_takes_from_everybody(patch: Patch) -> None:
    patch.setenv(failpoints.VARIABLE, "store.skip_fencing")


def the_learner_does_not_ask_whose_the_run_is(patch: Patch) -> None:
    patch.setattr(Writer, "confirm", lambda self: None)


def a_version_is_announced_before_its_checkpoint(patch: Patch) -> None:
    save, publish = Loop._checkpoint, Loop._publish

    def published(self: Loop) -> None:
        publish(self)
        save(self)

    patch.setattr(Loop, "_checkpoint", lambda self: None)
    patch.setattr(Loop, "_publish", published)


def what_was_read_counts_as_done(patch: Patch) -> None:
    patch.setattr(TrajectoryReader, "offsets", lambda self: dict(self._read_to))


def groups_offered_after_the_checkpoint_are_not_looked_for(patch: Patch) -> None:
    patch.setattr(TaskPublisher, "_adopt", lambda self, task_offsets, now: None)


def the_ledger_is_not_restored(patch: Patch) -> None:
    patch.setattr(TrajectoryLedger, "restore", lambda self, state, *, now: None)


def the_history_is_not_cut(patch: Patch) -> None:
    patch.setattr(history, "_first", lambda path, length: path.read_bytes() if path.exists() else b"")


DEATHS: Mapping[Callable[[Patch], None], tuple[str, How]] = {
    the_store_takes_from_everybody: ("learner.after_step", How.STANDS_STILL),
    the_learner_does_not_ask_whose_the_run_is: ("learner.before_announcing", How.STANDS_STILL),
    a_version_is_announced_before_its_checkpoint: ("learner.after_publishing", How.DIES),
    what_was_read_counts_as_done: ("learner.before_reading", How.DIES),
    groups_offered_after_the_checkpoint_are_not_looked_for: ("learner.before_reading", How.DIES),
    the_ledger_is_not_restored: ("learner.after_publishing", How.DIES),
    the_history_is_not_cut: ("learner.inside_checkpoint", How.DIES),
}


@pytest.mark.parametrize("without", DEATHS, ids=lambda without: without.__name__)
def test_the_lack_of_a_mechanism_does_not_go_unnoticed(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    place, how = DEATHS[without]
    with pytest.raises((AssertionError, TimeoutError)):
        unnoticed(tmp_path, Fault(place, 2, how))


def unnoticed(folder: Path, fault: Fault) -> None:
    for seed in range(ENOUGH):
        (folder / f"{seed}").mkdir()
        judged(seed, folder / f"{seed}", plan=[replace(fault)])
