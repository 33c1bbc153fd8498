"""A learner's ingest for tests, with one environment and groups of two."""

from collections.abc import Callable

import msgspec

from palimpsest.common.bus.port import Bus
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.ingest.build import Ingest, build_ingest
from palimpsest.services.learner.ingest.offers import TaskSettings
from palimpsest.services.learner.ingest.trajectory_reader import NoEvaluations, ReceivedTrajectory
from tests.records.any_learner import any_control
from tests.records.builders import SAMPLING

VOCABULARY = 200_000
"""Number of token ids of the model; `a_finished` uses one id for each of its tokens."""
Ledger = TrajectoryLedger[ReceivedTrajectory]


def an_ingest(
    bus: Bus,
    *,
    samples: int = 2,
    groups: int = 2,
    max_staleness: int = 1,
    keep_flushed: bool = False,
    confirm: Callable[[], None] = lambda: None,
    on_resolved: Callable[[str], None] = lambda _: None,
    ledger: type[Ledger] = Ledger,
    most_tokens: int = SAMPLING.max_trajectory_tokens,
    epoch: int = 1,
    control: ControlCheck | None = None,
) -> Ingest:
    """An ingest that is not started. `groups`: groups per batch. `most_tokens`: limit of a trajectory."""
    sampling = msgspec.structs.replace(SAMPLING, max_trajectory_tokens=most_tokens)
    return build_ingest(
        bus,
        ledger(samples=samples, groups_per_batch=groups, max_staleness=max_staleness, time_limit_s=60),
        TaskSettings(0, {"lookup": 1.0}, samples, sampling, 60),
        run="test",
        vocabulary=VOCABULARY,
        confirm=confirm,
        epoch=lambda: epoch,
        control=control or any_control(),
        evaluations=NoEvaluations(),
        keep_flushed=keep_flushed,
        on_resolved=on_resolved,
    )
