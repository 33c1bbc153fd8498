"""The status of the learner's loop, which the HTTP thread reads."""

from types import SimpleNamespace
from typing import Any

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Stop
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import TrajectoryLedger
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.loop import Loop
from palimpsest.services.learner.loop_status import LoopStatus

LEARNER = {"loop": "learner"}


def test_a_status_does_not_change_while_the_ledger_does() -> None:
    """The HTTP thread would otherwise iterate over collections that the loop changes, and fail now and then."""
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 3}}
    )
    ledger: TrajectoryLedger[str] = TrajectoryLedger(samples=2, groups_per_batch=2, max_staleness=1, time_limit_s=60)
    unused: Any = SimpleNamespace()
    parts = SimpleNamespace(trainer=None, policy=None, state=None, ranks=None, shards=None)
    ingest = SimpleNamespace(ledger=ledger, reader=None, tasks=None, dead_letters=None)
    evaluator = SimpleNamespace(status=str, result=str)
    outputs = SimpleNamespace(writer=SimpleNamespace(epoch=1), publisher=None, checkpoints=None, evaluator=evaluator)
    control = RunControl(config, ControlDesk(""), publish=lambda _: None)
    loop = Loop(config, parts, ingest, unused, outputs, unused, control, Stop())  # type: ignore[arg-type]
    assert loop.status.not_ready() == "the start"
    loop.update_status()
    before = loop.status.fields()
    ledger.offer(now=0.0)
    assert loop.status.fields() is before
    assert before["trajectories"]["offered"] == 0
    loop.update_status()
    assert loop.status.fields()["trajectories"]["offered"] == 2


def test_a_published_version_has_an_age_and_each_status_a_heartbeat() -> None:
    status = LoopStatus()
    status.published(Version(7))
    ledger: TrajectoryLedger[str] = TrajectoryLedger(samples=2, groups_per_batch=2, max_staleness=1, time_limit_s=60)
    status.update(ledger, now=0.0)
    assert REGISTRY.get_sample_value("palimpsest_learner_version") == 7
    for name, labels in (("palimpsest_learner_last_version_seconds", {}), ("palimpsest_heartbeat_seconds", LEARNER)):
        first, second = REGISTRY.get_sample_value(name, labels), REGISTRY.get_sample_value(name, labels)
        assert first is not None
        assert second is not None
        assert 0 < first < second
