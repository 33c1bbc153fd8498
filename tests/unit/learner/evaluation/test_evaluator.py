"""An evaluator over a log in memory: offers, ends, restarts, results, pins."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from palimpsest.common.evaluation.tasks import FIRST_SEED, held_out_tasks
from palimpsest.common.messages import (
    CONTROL,
    TASKS,
    DropReason,
    EvaluationEnded,
    EvaluationStarted,
    GroupOffered,
    TrajectoryDropped,
    TrajectoryFinished,
    decode,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.versions import Version
from palimpsest.services.learner.evaluation.evaluator import Evaluator
from palimpsest.services.learner.evaluation.settings import EvaluationSettings
from palimpsest.services.learner.evaluation.state import EvaluationState
from palimpsest.services.learner.observability.history import History
from tests.records.builders import SAMPLING, a_finished, a_segment
from tests.simulation.memory_bus import MemoryBus, Store

VERSIONS = 9
SETTINGS = EvaluationSettings(
    every=3, tasks=held_out_tasks(["lookup"], 2), samples=2, sampling=SAMPLING, time_limit_s=60.0, waits=False
)


@dataclass
class KnownPins:
    """Records the pins."""

    held: dict[str, Version | None] = field(default_factory=dict)

    def move(self, name: str, version: Version | None) -> None:
        self.held[name] = version


@dataclass
class Place:
    """What outlives a learner."""

    file: Path
    bus: MemoryBus
    pins: KnownPins = field(default_factory=KnownPins)
    now: float = 0.0

    def learner(
        self, state: EvaluationState | None = None, *, version: int = 0, trained: int = 0, **settings: Any
    ) -> Evaluator:
        """A started evaluator."""
        evaluator = Evaluator(
            replace(SETTINGS, **settings),
            self.bus,
            self.pins,  # type: ignore[arg-type]
            run="test",
            confirm=lambda: None,
            epoch=lambda: 1,
            open_file=lambda length: History(self.file, length=length),
            clock=lambda: self.now,
        )
        if state is not None:
            evaluator.restore(state, {})
        evaluator.start(Version(version), trained)
        return evaluator

    def sent(self, topic: str) -> list[Any]:
        with self.bus.consumer(topic) as consumer:
            return [decode(topic, record.body) for record in consumer.poll(limit=1000, timeout_s=0)]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    bus = MemoryBus(Store())
    bus.create_topics({TASKS: 2, CONTROL: 1})
    return Place(tmp_path / "evaluations.jsonl", bus)


def sample(task: int, number: int, *, version: int = 0, success: bool = True, **changes: Any) -> TrajectoryFinished:
    group = f"e{version:06d}-{task:06d}"
    base = a_finished(0, 0, segments=(a_segment(2, 4, version), a_segment(5, 7, version)), reward=float(success))
    return msgspec.structs.replace(base, **{"group": group, "trajectory": f"{group}/{number}", **changes})


def score_all(evaluator: Evaluator, version: int, success: Callable[[int, int], bool] = lambda *_: True) -> None:
    for task in range(2):
        for number in range(2):
            evaluator.enter(sample(task, number, version=version, success=success(task, number)))


def test_the_starting_model_every_nth_and_the_last_version_are_evaluated(place: Place) -> None:
    evaluator = place.learner()
    seen = []
    for trained in range(VERSIONS + 1):
        evaluator.work(Version(trained), trained, VERSIONS)
        if evaluator.in_progress:
            seen.append(trained)
            score_all(evaluator, trained)
            evaluator.work(Version(trained), trained, VERSIONS)
        assert not evaluator.in_progress
    assert seen == [0, 3, 6, 9]
    assert [line["version"] for line in place.lines()] == seen


def test_offers_are_marked_and_of_tasks_that_the_training_never_draws(place: Place) -> None:
    place.learner().work(Version(0), 0, VERSIONS)
    offers: list[GroupOffered] = place.sent(TASKS)
    assert [
        (o.group, o.task_seed - FIRST_SEED, o.samples, o.evaluation) for o in sorted(offers, key=lambda o: o.index)
    ] == [
        ("e000000-000000", 0, 2, True),
        ("e000000-000001", 1, 2, True),
    ]
    assert place.sent(CONTROL) == [EvaluationStarted(run="test", version=Version(0), writer=1)]
    assert place.pins.held == {"evaluation": 0}


def test_the_result_is_written_and_workers_go_on(place: Place) -> None:
    evaluator = place.learner()
    evaluator.work(Version(0), 0, VERSIONS)
    score_all(evaluator, 0, lambda task, number: task == 0 and number == 0)
    place.now = 7.0
    evaluator.work(Version(0), 0, VERSIONS)
    (line,) = place.lines()
    assert line["evaluation"]["lookup"]["avg"]["value"] == 0.25
    assert line["evaluation"]["lookup"]["passed"]["value"] == 0.5
    assert line["trajectories"] == {"offered": 4, "scored": 4, "dropped": {}, "dead_lettered": 0, "pending": 0}
    assert (line["seconds"], line["best"], line["overall"]) == (7.0, 0, 0.25)
    assert place.sent(CONTROL)[-1] == EvaluationEnded(run="test", version=Version(0), writer=1)
    assert place.pins.held == {"evaluation": None, "best": 0}


def test_the_best_version_is_pinned_the_earlier_of_equal_ones(place: Place) -> None:
    evaluator = place.learner()
    for trained, solved in ((0, 0), (3, 2), (6, 2), (9, 1)):
        evaluator.work(Version(trained), trained, VERSIONS)
        score_all(evaluator, trained, lambda task, number, solved=solved: task < solved)  # type: ignore[misc]
        evaluator.work(Version(trained), trained, VERSIONS)
    assert [line["best"] for line in place.lines()] == [0, 3, 3, 3]
    assert place.pins.held["best"] == 3


def test_a_failed_trajectory_is_counted_and_does_not_score_zero(place: Place) -> None:
    evaluator = place.learner()
    evaluator.work(Version(0), 0, VERSIONS)
    for task, number in ((0, 0), (0, 1), (1, 0)):
        evaluator.enter(sample(task, number))
    evaluator.enter(
        TrajectoryDropped(
            run="test", trajectory="e000000-000001/1", group="e000000-000001", worker="w",
            reason=DropReason.ENVIRONMENT_FAILED, detail="",
        )
    )  # fmt: skip
    evaluator.work(Version(0), 0, VERSIONS)
    (line,) = place.lines()
    assert line["evaluation"]["lookup"]["avg"]["value"] == 1.0
    assert line["evaluation"]["lookup"]["short"] == 1
    assert line["trajectories"]["dropped"] == {"environment_failed": 1}


def test_late_trajectories_end_the_evaluation_at_its_time_limit(place: Place) -> None:
    evaluator = place.learner()
    evaluator.work(Version(0), 0, VERSIONS)
    evaluator.enter(sample(0, 0))
    place.now = 61.0
    evaluator.work(Version(0), 0, VERSIONS)
    (line,) = place.lines()
    assert line["trajectories"] | {} == {
        "offered": 4, "scored": 1, "dropped": {"deadline": 3}, "dead_lettered": 0, "pending": 0,
    }  # fmt: skip
    evaluator.enter(sample(0, 1))  # late: neither counted nor rejected
    assert len(place.lines()) == 1


@pytest.mark.parametrize(
    "message",
    [
        sample(0, 0, version=1),
        sample(5, 0),
        sample(0, 2),
        sample(0, 0, trajectory="e000000-000001/0"),
        sample(0, 0, environment="add"),
        sample(0, 0, temperature=0.5),
    ],
    ids=["version", "task", "sample", "group", "environment", "temperature"],
)
def test_what_was_not_offered_is_rejected(place: Place, message: TrajectoryFinished) -> None:
    evaluator = place.learner()
    evaluator.work(Version(0), 0, VERSIONS)
    with pytest.raises(RejectedRecord):
        evaluator.enter(message)
    assert evaluator.state().ends == {}


def test_a_trajectory_that_crossed_a_change_of_weights_is_rejected(place: Place) -> None:
    evaluator = place.learner()
    evaluator.work(Version(0), 0, VERSIONS)
    whole = sample(0, 0)
    later = msgspec.structs.replace(whole.segments[-1], version=Version(1))
    with pytest.raises(RejectedRecord, match="versions of its tokens"):
        evaluator.enter(msgspec.structs.replace(whole, segments=(*whole.segments[:-1], later)))


def test_training_goes_on_unless_the_next_version_is_due_or_training_would_cut_the_workers(place: Place) -> None:
    evaluator = place.learner()
    assert evaluator.permits_training(0, VERSIONS)
    evaluator.work(Version(0), 0, VERSIONS)
    assert [evaluator.permits_training(trained, VERSIONS) for trained in range(4)] == [True, True, False, True]
    cutting = Place(place.file.with_name("other"), place.bus).learner(waits=True)
    cutting.work(Version(0), 0, VERSIONS)
    assert not cutting.permits_training(0, VERSIONS)


def test_a_restart_resumes_the_evaluation_without_new_offers(place: Place) -> None:
    before = place.learner()
    before.work(Version(0), 0, VERSIONS)
    before.enter(sample(0, 0))
    after = place.learner(before.state(), version=0, trained=1)
    assert after.in_progress
    assert len(place.sent(TASKS)) == 2
    for task, number in ((0, 1), (1, 0), (1, 1)):
        after.enter(sample(task, number))
    after.work(Version(1), 1, VERSIONS)
    assert place.lines()[0]["trajectories"]["scored"] == 4


def test_a_restart_from_before_the_evaluation_adopts_its_offers(place: Place) -> None:
    first = place.learner()
    first.work(Version(0), 0, VERSIONS)
    again = place.learner(EvaluationState(), version=0, trained=0)
    assert again.in_progress
    assert len(place.sent(TASKS)) == 2
    score_all(again, 0)  # also what the workers of the first learner sampled
    again.work(Version(0), 0, VERSIONS)
    assert len(place.lines()) == 1


def test_an_evaluation_of_a_lost_version_is_abandoned_and_repeated(place: Place) -> None:
    """A learner died after version 3; its successor continues from a checkpoint with the next free number."""
    first = place.learner()
    first.work(Version(0), 0, VERSIONS)
    score_all(first, 0)
    first.work(Version(0), 0, VERSIONS)
    state = first.state()
    first.work(Version(3), 3, VERSIONS)
    again = place.learner(state, version=4, trained=3)
    again.work(Version(4), 3, VERSIONS)
    again.enter(sample(0, 0, version=3))  # of the abandoned one: no dead letter
    score_all(again, 4)
    again.work(Version(4), 3, VERSIONS)
    assert [line["version"] for line in place.lines()] == [0, 4]
    assert again.state().evaluated == (0, 3, 4)


def test_the_file_is_truncated_to_the_checkpoint(place: Place) -> None:
    first = place.learner()
    first.work(Version(0), 0, VERSIONS)
    state = first.state()
    score_all(first, 0)
    first.work(Version(0), 0, VERSIONS)
    again = place.learner(state, version=0, trained=0)
    score_all(again, 0)
    again.work(Version(0), 0, VERSIONS)
    assert [line["version"] for line in place.lines()] == [0]


def test_a_run_without_evaluations_offers_none(place: Place) -> None:
    evaluator = place.learner(every=0)
    for trained in range(VERSIONS + 1):
        evaluator.work(Version(trained), trained, VERSIONS)
        assert evaluator.permits_training(trained, VERSIONS)
    assert place.sent(TASKS) == []
    assert place.lines() == []
