"""Learners that publish in a thread survive every fault, as those that publish inline, and each rule is needed."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.versions import Version
from palimpsest.services.learner.loop import Loop
from palimpsest.services.learner.publishing.publishing import Checkpoint, Naming, Publishing
from tests.simulation.cut_schedules import slow_polling
from tests.simulation.learner_checks import run_and_check
from tests.simulation.learner_faults import ANYWHERE, Fault, FaultKind, configured, places
from tests.simulation.learner_schedules import LearnerSchedule

pytestmark = pytest.mark.thorough

LEARNERS = [place for place in places() if place.startswith("learner.") and not place.endswith("_shards")]
WORKERS = [place for place in places() if place.startswith("rollout.")]
CHUNK = 5
CHUNKS = [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(CHUNK, 300, CHUNK))]
"""First seed of each chunk."""
ENOUGH = 10
"""Runs within which the removal of a rule must show."""
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> Iterator[None]:
    slow_polling(monkeypatch)
    with structlog.testing.capture_logs():
        yield


def run(seed: int, folder: Path, *plan: Fault, of_worker: Fault | None = None, evaluated: int = 3) -> LearnerSchedule:
    """Without evaluations, which hold the workers, batches are taken later after an announcement."""
    folder.mkdir(exist_ok=True)
    return run_and_check(seed, folder, plan=plan, of_worker=of_worker, publishing="background", evaluated=evaluated)


@pytest.mark.parametrize(("place", "kind"), list(zip(LEARNERS, itertools.cycle(FaultKind), strict=False)))
def test_the_run_survives_a_learner_fault_at_every_failpoint(place: str, kind: FaultKind, tmp_path: Path) -> None:
    """One kind of fault for each place; the next test tries all kinds."""
    fault = Fault(place, 2, kind)
    run(0, tmp_path, fault)
    assert fault.happened, "the run did not reach the failpoint"


@pytest.mark.long
@pytest.mark.parametrize("visit", [1, 3])
@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("place", LEARNERS)
def test_the_run_survives_every_kind_of_learner_fault_at_every_failpoint(
    place: str, kind: FaultKind, visit: int, tmp_path: Path
) -> None:
    run(visit, tmp_path, Fault(place, visit, kind))


@pytest.mark.parametrize("first", CHUNKS)
def test_the_run_survives_random_faults_of_successive_learners(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + CHUNK):
        chances = random.Random(f"plan {seed}")

        def fault(places: list[str], kinds: list[FaultKind], chances: random.Random = chances) -> Fault:
            return Fault(chances.choice(places), chances.randint(1, 3), chances.choice(kinds))

        plan = [fault([*LEARNERS, *LEARNERS, ANYWHERE], list(FaultKind)) for _ in range(chances.randint(1, 5))]
        worker = fault(WORKERS, [FaultKind.DIE, FaultKind.PAUSE]) if chances.random() < 0.5 else None
        try:
            run(seed, tmp_path / f"{seed}", *plan, of_worker=worker, evaluated=chances.choice([0, 3]))
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise


@pytest.mark.parametrize("every", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("place", "kind"),
    [("inside_checkpoint", FaultKind.DIE), ("before_committing", FaultKind.PAUSE), ("after_publishing", FaultKind.DIE)],
)
def test_the_run_survives_a_fault_while_a_checkpoint_is_in_writing(
    place: str, kind: FaultKind, every: int, tmp_path: Path
) -> None:
    """Checkpoints have a thread of their own."""
    fault = Fault(f"learner.{place}", 1, kind)
    run_and_check(every, tmp_path, plan=[fault], publishing="background", every=every)
    assert fault.happened, "the run did not reach the failpoint"


def test_every_evaluation_that_is_due_takes_place(tmp_path: Path) -> None:
    run(0, tmp_path)
    assert evaluated(tmp_path) == [0, 3, 5]


def evaluated(folder: Path) -> list[int]:
    """Numbers of versions that were trained when an evaluation began."""
    lines = (configured(folder).run.home / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["trained_versions"] for line in lines]


def permitted(patch: Patch, what: Naming) -> None:
    permits = Publishing.permits
    patch.setattr(Publishing, "permits", lambda self, asked: asked == what or permits(self, asked))


def offers_do_not_wait(patch: Patch) -> None:
    permitted(patch, "offers")


def scores_do_not_wait(patch: Patch) -> None:
    permitted(patch, "scores")


def changes_do_not_wait(patch: Patch) -> None:
    permitted(patch, "changes")
    patch.setattr(ControlDesk, "has_requests", False)


def evaluations_do_not_wait(patch: Patch) -> None:
    patch.setattr(Loop, "_names_the_version", lambda self: self._control.has_requests)


def the_step_does_not_wait(patch: Patch) -> None:
    patch.setattr(Publishing, "wait", lambda self: True)


def a_version_is_announced_before_its_checkpoint(patch: Patch) -> None:
    write = Publishing._write

    def written(
        self: Publishing, version: Version, prepared: tuple[Canary, ...], checkpoint: Checkpoint | None, now: float
    ) -> Manifest:
        manifest = write(self, version, prepared, None, now)
        if checkpoint is not None:
            self.save(checkpoint)
        return manifest

    patch.setattr(Publishing, "_write", written)


RULES: Mapping[Callable[[Patch], None], Fault | None] = {
    offers_do_not_wait: None,
    scores_do_not_wait: None,
    changes_do_not_wait: None,
    evaluations_do_not_wait: None,
    the_step_does_not_wait: None,
    # The first version: the evaluation keeps workers at version 0, and later batches are too old to be trained again.
    a_version_is_announced_before_its_checkpoint: Fault("learner.inside_checkpoint", 1, FaultKind.DIE),
}


@pytest.mark.parametrize("without", RULES, ids=lambda without: without.__name__)
def test_removing_a_rule_makes_a_run_fail(without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch) -> None:
    without(monkeypatch)
    with pytest.raises((AssertionError, TimeoutError)):
        run_all(tmp_path, RULES[without], evaluated=0 if without is scores_do_not_wait else 3)


def run_all(folder: Path, fault: Fault | None, *, evaluated: int) -> None:
    for seed in range(ENOUGH):
        run(seed, folder / f"{seed}", *([replace(fault)] if fault else []), evaluated=evaluated)
