"""Engines and the learner use one GPU by turns: no engine holds memory while the learner computes, and nothing is lost.

Whole runs in simulated time (tests/simulation/learner_schedules.py), with real workers, real learners and faults.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog

from palimpsest.common.bus.port import Record
from palimpsest.common.messages import CONTROL, WORKERS, CutReleased, CutRequested, VersionPublished, decode
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner import coordinator
from palimpsest.services.learner.old_logprobs.interruption.liveness import ALIVE_S
from palimpsest.services.learner.old_logprobs.routes import InterruptionRoute
from palimpsest.services.rollout.cut_responder import CutResponder
from tests.simulation.cut_schedules import slow_polling
from tests.simulation.cut_worker import process_name
from tests.simulation.learner_checks import run_and_check
from tests.simulation.learner_faults import Fault, FaultKind
from tests.simulation.learner_schedules import LearnerSchedule

pytestmark = pytest.mark.thorough
SEEDS = 3
QUIET_S = 0.9 * ALIVE_S
Patch = pytest.MonkeyPatch


freed: list[str] = []
"""Learners that returned what torch had cached, in this order."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> Iterator[None]:
    slow_polling(monkeypatch)
    freed.clear()
    monkeypatch.setattr(coordinator, "release_gpu_cache", lambda: freed.append(process_name.get()))
    with structlog.testing.capture_logs():
        yield


@dataclass
class Turns(LearnerSchedule):
    """Checks at each pass of the learner that the engines sleep."""

    serving: set[str] = field(default_factory=set)
    """Worker processes that have reported a version."""
    expected: set[str] | None = None
    """Those that had done so when the open cut was requested; None if no cut is open."""
    heard: dict[str, float] = field(default_factory=dict)
    """Worker process -> time of its last record."""
    quiet: set[str] = field(default_factory=set)
    """Worker processes that were silent for so long during the open cut that the learner may take them for dead."""
    turns: int = 0
    """Versions that were trained while engines slept."""

    def _note(self, topic: str, records: Sequence[Record]) -> None:
        super()._note(topic, records)
        if topic == WORKERS:
            self._hear(process_name.get())
        for record in records if topic in (CONTROL, WORKERS) else ():
            match decode(topic, record.body):
                case CutRequested():
                    self.expected, self.quiet = set(self.serving), set()
                case CutReleased():
                    self.expected = None
                case VersionPublished():
                    self.expected = None
                    assert freed.pop() == process_name.get(), "engines wake before the learner has returned its cache"
                case report if topic == WORKERS and report.version >= 0:
                    self.serving.add(process_name.get())

    def _hear(self, process: str) -> None:
        now = self.loop.time()
        if now - self.heard.get(process, now) > QUIET_S:
            self.quiet.add(process)
        self.heard[process] = now

    def computes(self, what: str) -> None:
        if process_name.get() != f"learner.{self.writer}":
            return  # it was replaced while it was paused
        assert self.expected is not None, f"the learner {what} outside a cut"
        now = self.loop.time()
        silent = {name for name, at in self.heard.items() if now - at > QUIET_S}
        here = (self.expected & self.engines.keys()) - self.quiet - silent
        awake = sorted(name for name in here if not self.engines[name].asleep)
        assert not awake, f"the learner {what} while the engines of {awake} are awake"
        self.turns += what == "trains" and bool(here)


def run_by_turns(folder: Path, seed: int, **options: Any) -> Turns:
    schedule = run_and_check(seed, folder, kind=Turns, sleep=True, **options)
    assert isinstance(schedule, Turns)
    return schedule


def test_all_engines_sleep_before_the_learner_computes_and_wake_before_they_sample(tmp_path: Path) -> None:
    continued = 0
    for seed in range(SEEDS):
        (tmp_path / f"{seed}").mkdir()
        schedule = run_by_turns(tmp_path / f"{seed}", seed)
        assert schedule.turns >= schedule.config.learner.versions - 1
        continued += sum(len(set(row.versions.tolist()) - {UNTRAINABLE}) > 1 for _, _, row in schedule.trained)
    assert continued, "no trajectory continued with another version after the sleep"


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("learner.at_cut", FaultKind.STOP),
        pytest.param("learner.at_cut", FaultKind.DIE, marks=pytest.mark.long),
        ("learner.after_cut", FaultKind.DIE),
        pytest.param("learner.after_cut", FaultKind.PAUSE, marks=pytest.mark.long),
        pytest.param("learner.after_step", FaultKind.DIE, marks=pytest.mark.long),
        ("learner.before_announcing", FaultKind.PAUSE),
        ("learner.after_publishing", FaultKind.DIE),
    ],
)
def test_a_learner_that_fails_leaves_no_engine_asleep(place: str, kind: FaultKind, tmp_path: Path) -> None:
    fault = Fault(place, 2, kind)
    run_by_turns(tmp_path, 1, plan=[fault])
    assert fault.happened


@pytest.mark.parametrize(
    ("place", "kind"), [("rollout.at_cut", FaultKind.DIE), ("rollout.after_flush", FaultKind.PAUSE)]
)
def test_a_worker_that_fails_at_a_cut_delays_no_one_for_ever(place: str, kind: FaultKind, tmp_path: Path) -> None:
    fault = Fault(place, 1, kind)
    run_by_turns(tmp_path, 1, of_worker=fault)
    assert fault.happened


def engines_stay_awake(patch: Patch) -> None:
    begin = CutResponder.__init__
    patch.setattr(CutResponder, "__init__", lambda self, **given: begin(self, **{**given, "sleeps": False}))


def the_learner_computes_before_the_cut(patch: Patch) -> None:
    begin = InterruptionRoute.__init__
    patch.setattr(InterruptionRoute, "__init__", lambda self, *parts, sleeping: begin(self, *parts, sleeping=False))


@pytest.mark.parametrize("without", [engines_stay_awake, the_learner_computes_before_the_cut])
def test_the_check_sees_a_learner_that_does_not_wait_its_turn(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises(AssertionError, match=r"the learner (scores|trains) (while the engines|outside a cut)"):
        run_by_turns(tmp_path, 1)
