"""Every moment has a phase: the phases of a version add up to its time, on a clock of the test."""

import itertools
import random
from pathlib import Path

import pytest

from palimpsest.common.config.learner import OptimizerConfig
from palimpsest.common.versions import Version
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.timing import PhaseTimer
from palimpsest.services.learner.training import trainer
from tests.learner_parts.models import CurrentModel, load, train
from tests.records.builders import UNCORRECTED, a_learner, a_row


class Clock:
    """Moves only when `pass_` is called."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_phases_are_exclusive_and_the_base_has_the_rest() -> None:
    clock = Clock()
    timer = PhaseTimer(clock, base="report")
    clock.pass_(1)
    with timer.of("wait"):
        clock.pass_(2)
        with timer.of("score"):
            clock.pass_(4)
        clock.pass_(8)
    clock.pass_(16)
    assert timer.take() == {"report": 17, "wait": 10, "score": 4}

    def fail() -> None:
        with timer.of("publish"):
            clock.pass_(32)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    clock.pass_(64)
    assert timer.take() == {"report": 64, "publish": 32}


def test_a_version_that_ends_inside_a_phase_splits_it() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.of("publish"):
        clock.pass_(1)
        assert timer.take() == {"other": 0, "publish": 1}
        clock.pass_(2)
    assert timer.take() == {"publish": 2, "other": 0}


def test_the_phases_of_random_nestings_add_up() -> None:
    draw, clock = random.Random(5), Clock()
    timer = PhaseTimer(clock)

    def nest(depth: int) -> None:
        for _ in range(draw.randrange(3)):
            clock.pass_(draw.randrange(10))
            if depth:
                with timer.of(draw.choice("abc")):
                    nest(depth - 1)

    for _ in range(200):
        began = clock.now
        nest(4)
        assert sum(timer.take().values()) == clock.now - began


def test_the_phases_of_a_training_add_up(starting_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock advances it by one second, so a phase that nothing counts would be missing in the sum."""
    looks = itertools.count()
    monkeypatch.setattr(trainer, "PhaseTimer", lambda **named: PhaseTimer(lambda: float(next(looks)), **named))
    model = load(starting_model)
    rows = [a_row(f"g{i}/0", [5, 6, 7], [-1, 0, 0], behavior=[0.0, -5.0, -5.0]) for i in range(2)]
    trained = train(
        TrainablePolicy(model, OptimizerConfig()), CurrentModel(model), ProcessGroup(), [rows[:1], rows[1:]],
        Version(0), config=a_learner(discrepancy=UNCORRECTED),
    )  # fmt: skip
    assert set(trained.seconds) == {"prepare", "proximal", "audit", "passes", "cut", "step", "summary"}
    assert sum(trained.seconds.values()) == next(looks) - 1
