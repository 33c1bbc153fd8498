"""Random schedules of cuts and faults: the sampling weights score every trained token exactly once."""

import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest import trajectory_reader
from palimpsest.services.learner.old_logprobs.interruption import coordinator as asking, outage_clock
from palimpsest.services.learner.old_logprobs.interruption.cut import Cut
from palimpsest.services.learner.old_logprobs.interruption.liveness import WorkerLiveness
from palimpsest.services.learner.old_logprobs.interruption.worker_feed import Heard, WorkerFeed
from palimpsest.services.rollout import cut_responder, trajectory_sampler
from palimpsest.services.rollout.cut_state import NOTHING, CutState
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed
from palimpsest.services.rollout.engine.scripted import ScriptedEngine
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.weights import WeightSync
from tests.runs.run_process import ROOT
from tests.simulation.cut_schedules import Schedule, latency, slow_polling
from tests.simulation.cut_worker import Engine, process_name
from tests.simulation.score_checker import InvariantViolated, ScoreChecker
from tests.simulation.simulated_time import SimulatedLoop, run

pytestmark = pytest.mark.thorough

CHUNK = 100
CHUNKS = [
    *(0, 100, 200),
    *(pytest.param(first, marks=pytest.mark.long) for first in range(300, 1000, CHUNK)),
]
"""First seed of each chunk."""
ENOUGH = 100
"""Schedules within which the removal of a mechanism must show; else the schedules hardly test it."""

Patch = pytest.MonkeyPatch
THIS = Path(__file__).relative_to(ROOT)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: Patch) -> Iterator[None]:
    slow_polling(monkeypatch)
    with structlog.testing.capture_logs():
        yield


@contextmanager
def noted(schedule: Schedule) -> Iterator[None]:
    """Record when a worker ends its hold by itself, and put the reader on the simulated clock."""
    with Patch.context() as patch:
        real = cut_responder.CutResponder._end_hold

        def end_hold(self: cut_responder.CutResponder) -> None:
            schedule.checker.released_holds.append((process_name.get(), self._cuts.held, schedule.loop.time()))
            real(self)

        patch.setattr(cut_responder.CutResponder, "_end_hold", end_hold)
        patch.setattr(trajectory_reader, "time", SimpleNamespace(monotonic=schedule.loop.time, time=schedule.loop.time))
        yield


def run_and_check(seed: int, folder: Path) -> ScoreChecker:
    """Run the schedule and return its checker. Raises InvariantViolated."""
    chances = random.Random(seed)

    async def main(loop: SimulatedLoop) -> ScoreChecker:
        schedule = Schedule(loop, chances, folder)
        with noted(schedule):
            await schedule.run()
        schedule.checker.check()
        return schedule.checker

    return run(main, latency(chances))


@pytest.mark.parametrize("first", CHUNKS)
def test_18_6_every_trained_token_is_scored_once_by_the_weights_that_sampled_it(first: int, tmp_path: Path) -> None:
    checkers = run_and_check_all(range(first, first + CHUNK), tmp_path)
    assert all(checker.kept and checker.reached for checker in checkers)
    assert sum(checker.unscored() for checker in checkers) < 0.05 * sum(len(checker.tokens) for checker in checkers)
    # every kind of fault has occurred
    assert all(
        (
            any(checker.released_holds for checker in checkers),
            sum(map(ScoreChecker.unscored, checkers)),
            sum(map(ScoreChecker.deaths, checkers)),
            sum(checker.engines_died for checker in checkers),
        )
    )


if "SEED" in os.environ:

    def test_18_6_one_schedule(tmp_path: Path) -> None:
        """Repeat one schedule: SEED=17 selects it."""
        run_and_check_all([int(os.environ["SEED"])], tmp_path)


def workers_do_not_hold(patch: Patch) -> None:
    real = WeightSync._resume_unless_held

    async def resume(self: WeightSync) -> None:
        self._held = NOTHING
        await real(self)

    patch.setattr(WeightSync, "_resume_unless_held", resume)


def cuts_ignore_unfinished_messages(patch: Patch) -> None:
    async def partial(self: Engine, request: str) -> None:
        return None

    patch.setattr(Engine, "partial", partial)


def cuts_ignore_trajectories_at_a_tool(patch: Patch) -> None:
    real = cut_responder.flush
    patch.setattr(cut_responder, "flush", lambda live, *a, **k: real(live, *a, **k) if live.request else None)


def workers_answer_before_their_records_are_durable(patch: Patch) -> None:
    async def flushed(self: Outbox) -> None:
        return None

    patch.setattr(Outbox, "flush", flushed)


def a_release_ends_the_hold_of_any_version(patch: Patch) -> None:
    def release(self: CutState) -> None:
        self.open, self.held = None, NOTHING

    patch.setattr(CutState, "release", release)


def copies_of_messages_count_as_new(patch: Patch) -> None:
    patch.setattr(CutState, "_is_news", lambda self, message: True)


def versions_of_tokens_are_wrong(patch: Patch) -> None:
    real = Engine._sample

    def sample(self, request, message):
        real(self, request, message)
        message.versions[-1] = Version(max(0, message.versions[-1] - (len(message.versions) == 2)))

    patch.setattr(Engine, "_sample", sample)


def outages_count_against_the_deadline(patch: Patch) -> None:
    patch.setattr(Cut, "restart_deadline", lambda self, *, now: None)


def outages_are_not_detected(patch: Patch) -> None:
    patch.setattr(outage_clock, "OUTAGE_S", 1e9)


def silence_during_an_outage_counts_as_death(patch: Patch) -> None:
    patch.setattr(WorkerLiveness, "discount_outage", lambda self, lost_s, *, now: None)


def the_learner_reads_one_poll_only(patch: Patch) -> None:
    def read_to_end(self: WorkerFeed, *, wait_s: float = 0.0) -> Heard:
        answers, _ = self._poll(timeout_s=wait_s)
        return Heard(answers, extends_cut=self._outages.extends_cut(self._note_read()))

    patch.setattr(WorkerFeed, "read_to_end", read_to_end)


def outages_end_the_hold(patch: Patch) -> None:
    patch.setattr(cut_responder, "ANSWER_S", 1e9)


def a_finished_cut_can_be_released(patch: Patch) -> None:
    real = asking.CutCoordinator.cut

    def cut(self: asking.CutCoordinator, *args: Any, **options: Any) -> asking.CutReport:
        report = real(self, *args, **options)
        self._open = report.cut
        return report

    def published(self: asking.CutCoordinator, version: Version, digest: str) -> None:
        self._scores.digests[version], self._open = digest, None

    patch.setattr(asking.CutCoordinator, "cut", cut)
    patch.setattr(asking.CutCoordinator, "published", published)


def a_dead_engine_counts_as_a_failed_request(patch: Patch) -> None:
    patch.setattr(trajectory_sampler, "EngineFailed", (EngineFailed, EngineDead))
    patch.setattr(Engine, "watch", ScriptedEngine.watch)


@pytest.mark.parametrize(
    "without",
    [
        a_dead_engine_counts_as_a_failed_request,
        workers_do_not_hold,
        cuts_ignore_unfinished_messages,
        cuts_ignore_trajectories_at_a_tool,
        workers_answer_before_their_records_are_durable,
        a_release_ends_the_hold_of_any_version,
        copies_of_messages_count_as_new,
        versions_of_tokens_are_wrong,
        outages_count_against_the_deadline,
        outages_are_not_detected,
        silence_during_an_outage_counts_as_death,
        the_learner_reads_one_poll_only,
        outages_end_the_hold,
        a_finished_cut_can_be_released,
    ],
    ids=lambda without: without.__name__,
)
def test_18_6_removing_a_mechanism_makes_a_schedule_fail(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises(InvariantViolated):
        run_and_check_all(range(ENOUGH), tmp_path)


def run_and_check_all(seeds: Iterable[int], folder: Path) -> list[ScoreChecker]:
    """Checkers of all schedules. A failure notes the command that repeats its schedule."""
    checkers = []
    for seed in seeds:
        try:
            checkers.append(run_and_check(seed, folder))
        except BaseException as error:
            error.add_note(f"schedule {seed}; alone: SEED={seed} make test ARGS='{THIS}::test_18_6_one_schedule'")
            raise
    return checkers
