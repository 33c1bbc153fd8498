"""Whatever happens when: every token that is trained on was scored once, by the weights that sampled it."""

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
from tests.simulation.cut_judge import Judge, Violated
from tests.simulation.cut_schedules import Engine, Schedule, latency, life, make_rare
from tests.simulation.simulated_time import SimulatedLoop, run

pytestmark = pytest.mark.thorough

CHUNK = 100
CHUNKS = [
    *(0, 100, 200),
    *(pytest.param(first, marks=pytest.mark.long) for first in range(300, 1000, CHUNK)),
]
"""The first seed of each."""
ENOUGH = 100
"""A mechanism whose lack shows in none of so many schedules would hardly be tried by the others."""

Patch = pytest.MonkeyPatch
THIS = Path(__file__).relative_to(ROOT)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: Patch) -> Iterator[None]:
    make_rare(monkeypatch)
    with structlog.testing.capture_logs():
        yield


@contextmanager
def noted(schedule: Schedule) -> Iterator[None]:
    """The judge is told when a worker gives the learner up, and the learner's patience is simulated, too."""
    with Patch.context() as patch:
        real = cut_responder.CutResponder._end_hold

        def give_up(self: cut_responder.CutResponder) -> None:
            schedule.judge.gave_up.append((life.get(), self._cuts.held, schedule.loop.time()))
            real(self)

        patch.setattr(cut_responder.CutResponder, "_end_hold", give_up)
        patch.setattr(trajectory_reader, "time", SimpleNamespace(monotonic=schedule.loop.time, time=schedule.loop.time))
        yield


def judged(seed: int, folder: Path) -> Judge:
    """The account of this schedule's run. Raises Violated."""
    chances = random.Random(seed)

    async def main(loop: SimulatedLoop) -> Judge:
        schedule = Schedule(loop, chances, folder)
        with noted(schedule):
            await schedule.run()
        schedule.judge.verdict()
        return schedule.judge

    return run(main, latency(chances))


@pytest.mark.parametrize("first", CHUNKS)
def test_18_6_every_token_that_is_trained_on_was_scored_once_by_the_weights_that_sampled_it(
    first: int, tmp_path: Path
) -> None:
    judges = judged_all(range(first, first + CHUNK), tmp_path)
    assert all(judge.kept and judge.reached for judge in judges)
    assert sum(judge.unscored() for judge in judges) < 0.05 * sum(len(judge.tokens) for judge in judges)
    # what is to be survived has happened
    assert all(
        (
            any(judge.gave_up for judge in judges),
            sum(map(Judge.unscored, judges)),
            sum(map(Judge.deaths, judges)),
            sum(judge.engines_died for judge in judges),
        )
    )


if "SEED" in os.environ:

    def test_18_6_one_schedule(tmp_path: Path) -> None:
        """Repeats one schedule: SEED=17 names it."""
        judged_all([int(os.environ["SEED"])], tmp_path)


def nothing_is_held(patch: Patch) -> None:
    real = WeightSync._resume_unless_held

    async def resume(self: WeightSync) -> None:
        self._held = NOTHING
        await real(self)

    patch.setattr(WeightSync, "_resume_unless_held", resume)


def messages_under_way_are_left_out(patch: Patch) -> None:
    async def partial(self: Engine, request: str) -> None:
        return None

    patch.setattr(Engine, "partial", partial)


def trajectories_at_a_tool_are_left_out(patch: Patch) -> None:
    real = cut_responder.flush
    patch.setattr(cut_responder, "flush", lambda live, *a, **k: real(live, *a, **k) if live.request else None)


def it_answers_before_its_records_are_durable(patch: Patch) -> None:
    async def flushed(self: Outbox) -> None:
        return None

    patch.setattr(Outbox, "flush", flushed)


def a_release_is_taken_for_any_version(patch: Patch) -> None:
    def let_go(self: CutState) -> None:
        self.open, self.held = None, NOTHING

    patch.setattr(CutState, "release", let_go)


def a_copy_is_taken_for_news(patch: Patch) -> None:
    patch.setattr(CutState, "_is_news", lambda self, message: True)


def versions_are_mixed_up(patch: Patch) -> None:
    real = Engine._sample

    def sample(self, request, message):
        real(self, request, message)
        message.versions[-1] = Version(max(0, message.versions[-1] - (len(message.versions) == 2)))

    patch.setattr(Engine, "_sample", sample)


def an_outage_takes_the_workers_time(patch: Patch) -> None:
    patch.setattr(Cut, "restart_deadline", lambda self, *, now: None)


def an_outage_goes_unnoticed(patch: Patch) -> None:
    patch.setattr(outage_clock, "OUTAGE_S", 1e9)


def silence_of_all_is_taken_for_their_death(patch: Patch) -> None:
    patch.setattr(WorkerLiveness, "discount_outage", lambda self, lost_s, *, now: None)


def one_poll_is_taken_for_all_that_workers_say(patch: Patch) -> None:
    def read_to_end(self: WorkerFeed, *, wait_s: float = 0.0) -> Heard:
        answers, _ = self._poll(timeout_s=wait_s)
        return Heard(answers, extends_cut=self._outages.extends_cut(self._note_read()))

    patch.setattr(WorkerFeed, "read_to_end", read_to_end)


def a_log_that_does_not_answer_is_taken_for_a_learner_that_is_gone(patch: Patch) -> None:
    patch.setattr(cut_responder, "ANSWER_S", 1e9)


def a_cut_is_released_when_it_is_over(patch: Patch) -> None:
    real = asking.CutCoordinator.cut

    def cut(self: asking.CutCoordinator, *args: Any, **options: Any) -> asking.CutReport:
        report = real(self, *args, **options)
        self._open = report.cut
        return report

    def published(self: asking.CutCoordinator, version: Version, digest: str) -> None:
        self._scores.digests[version], self._open = digest, None

    patch.setattr(asking.CutCoordinator, "cut", cut)
    patch.setattr(asking.CutCoordinator, "published", published)


def a_dead_engine_is_taken_for_one_that_fails(patch: Patch) -> None:
    patch.setattr(trajectory_sampler, "EngineFailed", (EngineFailed, EngineDead))
    patch.setattr(Engine, "watch", ScriptedEngine.watch)


@pytest.mark.parametrize(
    "without",
    [
        a_dead_engine_is_taken_for_one_that_fails,
        nothing_is_held,
        messages_under_way_are_left_out,
        trajectories_at_a_tool_are_left_out,
        it_answers_before_its_records_are_durable,
        a_release_is_taken_for_any_version,
        a_copy_is_taken_for_news,
        versions_are_mixed_up,
        an_outage_takes_the_workers_time,
        an_outage_goes_unnoticed,
        silence_of_all_is_taken_for_their_death,
        one_poll_is_taken_for_all_that_workers_say,
        a_log_that_does_not_answer_is_taken_for_a_learner_that_is_gone,
        a_cut_is_released_when_it_is_over,
    ],
    ids=lambda without: without.__name__,
)
def test_18_6_the_lack_of_a_mechanism_does_not_go_unnoticed(
    without: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    without(monkeypatch)
    with pytest.raises(Violated):
        judged_all(range(ENOUGH), tmp_path)


def judged_all(seeds: Iterable[int], folder: Path) -> list[Judge]:
    """The accounts of all these; a failure says how to repeat its schedule alone."""
    judges = []
    for seed in seeds:
        try:
            judges.append(judged(seed, folder))
        except BaseException as error:
            error.add_note(f"schedule {seed}; alone: SEED={seed} make test ARGS='{THIS}::test_18_6_one_schedule'")
            raise
    return judges
