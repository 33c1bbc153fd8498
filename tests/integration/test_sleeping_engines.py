"""Engines and the learner use their GPUs by turns: no engine holds memory while a rank of the learner computes, none
wakes while a rank holds what it computed with, and nothing is lost.

Whole runs in simulated time (tests/simulation/learner_schedules.py), with real workers, real learners and faults.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from palimpsest.common.bus.port import Record
from palimpsest.common.messages import (
    CONTROL,
    WORKERS,
    CutReleased,
    CutRequested,
    VersionPublished,
    WorkerAlive,
    decode,
)
from palimpsest.common.versions import UNTRAINABLE
from palimpsest.services.learner import gpu_cache
from palimpsest.services.learner.old_logprobs import distributed_scorer
from palimpsest.services.learner.old_logprobs.interruption.coordinator import CutCoordinator
from palimpsest.services.learner.old_logprobs.interruption.liveness import ALIVE_S, WorkerLiveness
from palimpsest.services.learner.old_logprobs.routes import InterruptionRoute
from palimpsest.services.rollout.cut_responder import CutResponder
from tests.simulation.cut_schedules import slow_polling
from tests.simulation.cut_worker import process_name
from tests.simulation.learner_checks import run_and_check
from tests.simulation.learner_faults import VERSIONS, Fault, FaultKind
from tests.simulation.learner_schedules import LearnerSchedule
from tests.simulation.simulated_ranks import own_rank
from tests.simulation.simulated_time import Actor

pytestmark = pytest.mark.thorough
SEEDS = 3
QUIET_S = 0.9 * ALIVE_S
Patch = pytest.MonkeyPatch


LONGEST_RETURN_S = 4.0
"""Simulated seconds in which a rank returns its cache."""
present: "list[Turns]" = []
"""The schedule of the present run."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: Patch) -> Iterator[None]:
    slow_polling(monkeypatch)
    present.clear()
    monkeypatch.setattr(gpu_cache, "release_gpu_cache", lambda: present[0].returns())
    with structlog.testing.capture_logs():
        yield


@dataclass
class Turns(LearnerSchedule):
    """Checks at each pass of a rank that the engines sleep, and when they wake that no rank holds memory."""

    operated: bool = False
    """Whether a person asks for cuts and checkpoints."""
    holding: set[tuple[str, int]] = field(default_factory=set)
    """Learner process and rank, if it has computed since it last returned what torch had cached."""
    in_cut: bool = False
    heard: dict[str, float] = field(default_factory=dict)
    """Worker process -> time of its last record."""
    quiet: set[str] = field(default_factory=set)
    """Worker processes that were silent for so long during the open cut that the learner may take them for dead."""
    turns: "Counter[int]" = field(default_factory=Counter)
    """Rank -> versions that it trained while engines slept."""
    releases: int = 0
    """Cuts that ended without a version."""

    def __post_init__(self) -> None:
        super().__post_init__()
        present[:] = [self]

    @property
    def has_operator(self) -> bool:
        return self.operated

    def _note(self, topic: str, records: Sequence[Record]) -> None:
        super()._note(topic, records)
        if topic == WORKERS:
            self._hear(process_name.get())
        for record in records if topic in (CONTROL, WORKERS) else ():
            match decode(topic, record.body):
                case CutRequested():
                    self.in_cut, self.quiet = True, set()
                case CutReleased() | VersionPublished():
                    self.in_cut = False
                    self.releases += isinstance(decode(topic, record.body), CutReleased)
                    holding = sorted(rank for process, rank in self.holding if process == process_name.get())
                    assert not holding, f"engines wake before ranks {holding} of the learner have returned their cache"

    def _hear(self, process: str) -> None:
        now = self.loop.time()
        if now - self.heard.get(process, now) > QUIET_S:
            self.quiet.add(process)
        self.heard[process] = now

    def starts(self) -> None:
        self.holding.add((process_name.get(), own_rank.get()))

    def returns(self) -> None:
        """A rank returns its cache."""
        Actor.here.actor.sleep(self.random.uniform(0.0, LONGEST_RETURN_S))
        self.holding.discard((process_name.get(), own_rank.get()))

    def computes(self, what: str) -> None:
        self.holding.add((process_name.get(), own_rank.get()))
        if process_name.get() != f"learner.{self.writer}":
            return  # it was replaced while it was paused
        assert self.in_cut, f"the learner {what} outside a cut"
        now = self.loop.time()
        silent = {name for name, at in self.heard.items() if now - at > QUIET_S}
        here = {name for name, engine in self.engines.items() if engine.resident} - self.quiet - silent
        awake = sorted(name for name in here if not self.engines[name].asleep)
        assert not awake, f"the learner {what} while the engines of {awake} are awake"
        self.turns[own_rank.get()] += what == "trains" and bool(here)


def run_by_turns(folder: Path, seed: int, *, operated: bool = False, **options: Any) -> Turns:
    schedule = run_and_check(seed, folder, kind=partial(Turns, operated=operated), sleep=True, **options)
    assert isinstance(schedule, Turns)
    return schedule


def run_several(folder: Path, seeds: int) -> None:
    for seed in range(seeds):
        (folder / f"{seed}").mkdir()
        run_by_turns(folder / f"{seed}", seed)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_all_engines_sleep_before_the_learner_computes_and_wake_before_they_sample(tmp_path: Path, ranks: int) -> None:
    continued, turns = 0, Counter[int]()
    for seed in range(SEEDS):
        (tmp_path / f"{seed}").mkdir()
        schedule = run_by_turns(tmp_path / f"{seed}", seed, ranks=ranks)
        turns += schedule.turns
        continued += sum(len(set(row.versions.tolist()) - {UNTRAINABLE}) > 1 for _, _, row in schedule.trained)
    assert sorted(turns) == list(range(ranks))
    assert min(turns.values()) > SEEDS * VERSIONS / 2, "few engines were there to sleep"
    assert continued, "no trajectory continued with another version after the sleep"


def test_a_cut_that_a_person_asks_for_takes_its_turn_and_gives_it_back(tmp_path: Path) -> None:
    assert run_by_turns(tmp_path, 1, operated=True, ranks=2).releases


@pytest.mark.parametrize("ranks", [1, 2])
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
def test_a_learner_that_fails_leaves_no_engine_asleep(place: str, kind: FaultKind, ranks: int, tmp_path: Path) -> None:
    fault = Fault(place, 2, kind)
    run_by_turns(tmp_path, 1, plan=[fault], ranks=ranks)
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
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_check_sees_a_learner_that_does_not_wait_its_turn(
    without: Callable[[Patch], None], ranks: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises(AssertionError, match=r"the learner (scores|trains) (while the engines|outside a cut)"):
        run_by_turns(tmp_path, 1, ranks=ranks)


def other_ranks_keep_their_cache(patch: Patch) -> None:
    patch.setattr(distributed_scorer, "return_cache", lambda ranks: ranks.all_gather_object("returned"))


def rank_0_does_not_wait_for_the_others(patch: Patch) -> None:
    for module in (gpu_cache, distributed_scorer):
        patch.setattr(module, "return_cache", lambda ranks: gpu_cache.release_gpu_cache())


@pytest.mark.parametrize("without", [other_ranks_keep_their_cache, rank_0_does_not_wait_for_the_others])
def test_the_check_sees_a_version_that_is_announced_before_all_ranks_have_returned_their_cache(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises(AssertionError, match=r"engines wake before ranks \[1\] of the learner have"):
        run_by_turns(tmp_path, 1, ranks=2)


def test_the_check_sees_a_cut_that_is_released_before_all_ranks_have_returned_their_cache(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    release = CutCoordinator._release

    def at_once(self: CutCoordinator, cut: int) -> None:
        self._before_waking = lambda: None
        release(self, cut)

    monkeypatch.setattr(CutCoordinator, "_release", at_once)
    with pytest.raises(AssertionError, match=r"engines wake before ranks \[.*\] of the learner have"):
        run_by_turns(tmp_path, 1, operated=True, ranks=2)


def no_cut_waits_for_a_worker_that_starts(patch: Patch) -> None:
    begin = WorkerLiveness.__init__
    patch.setattr(WorkerLiveness, "__init__", lambda self, sleeping: begin(self, sleeping=False))


def a_worker_starts_its_engine_before_it_is_heard_of(patch: Patch) -> None:
    async def join(self: CutResponder, alive: WorkerAlive) -> None: ...

    patch.setattr(CutResponder, "join", join)


@pytest.mark.parametrize(
    "without", [no_cut_waits_for_a_worker_that_starts, a_worker_starts_its_engine_before_it_is_heard_of]
)
def test_the_check_sees_an_engine_that_starts_in_the_learners_turn(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    """In some run a worker starts at the wrong moment."""
    without(monkeypatch)
    with pytest.raises(AssertionError, match=r"the learner (scores|trains) while the engines"):
        run_several(tmp_path, 8)
