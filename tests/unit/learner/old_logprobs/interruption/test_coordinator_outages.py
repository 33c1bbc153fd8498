"""Cuts during an outage of the log, and over a log whose records are in transit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from palimpsest.common.bus.port import Record
from palimpsest.common.bus.sqlite import SqliteConsumer
from palimpsest.common.messages import (
    WORKERS,
)
from palimpsest.services.learner.old_logprobs.interruption.outage_clock import MOST_LOST_S
from tests.learner_parts.interruption import (
    Learner,
    Log,
    Table,
    Ticking,
    a_flush,
    alive,
    digest,
    flushing,
)
from tests.records.builders import a_finished
from tests.unit.learner.old_logprobs.interruption.cuts import V0, requests


class OnRead(Protocol):
    """Called when the learner reads the worker topic for the n-th time since the cut request."""

    def __call__(self, read: int) -> None: ...


class RemoteLog(Log):
    """A log over a network: a poll with a timeout of 0 returns nothing, because records are in transit."""

    on_read: OnRead | None = None
    reads = 0

    def consumer(self, topic: str, *, group: str | None = None, member: str = "") -> SqliteConsumer:
        """See Bus."""
        consumer = super().consumer(topic, group=group, member=member)
        poll, ends = consumer.poll, consumer.ends

        def patient(*, limit: int, timeout_s: float) -> list[Record]:
            return poll(limit=limit, timeout_s=timeout_s) if timeout_s else []

        def answered() -> dict[int, int]:
            if topic == WORKERS and self.on_read is not None and requests(self):
                self.reads += 1
                self.on_read(self.reads)
            return ends()

        consumer.poll, consumer.ends = patient, answered  # type: ignore[method-assign]
        return consumer


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteLog]:
    log = RemoteLog(tmp_path / "remote")
    log.announced(0)
    yield log
    log.close()


def test_a_cut_waits_for_workers_whose_records_are_in_transit(remote: RemoteLog) -> None:
    learner = Learner(remote, Table(0))
    remote.report(alive("a"), alive("b"))
    remote.answers = [flushing("a", a_flush(1, 0)), flushing("b", a_flush(2, 0, worker="b"))]
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


def test_a_cut_scores_finished_trajectories_that_are_in_transit(remote: RemoteLog) -> None:
    learner = Learner(remote, Table(0))
    remote.sampled(a_finished(0, 0))
    assert learner.interruption.cut(V0, digest(0)).tokens_scored == 4


@pytest.mark.parametrize("out_s", [60.0, 400.0])
def test_an_outage_of_the_log_extends_the_deadline_of_the_workers(out_s: float, remote: RemoteLog) -> None:
    """Also two outages; the flushed tokens are scored."""
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.report(alive("a"), alive("b"))

    def on_read(read: int) -> None:
        match read:
            case 1 | 3:
                clock.now += out_s
            case 5:
                flushing("a", a_flush(1, 0))(remote, requests(remote)[-1])
            case 7:
                flushing("b", a_flush(2, 0, worker="b"))(remote, requests(remote)[-1])

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a", "b"), (), 8)


@pytest.mark.thorough
def test_repeated_outages_extend_a_cut_up_to_a_limit(remote: RemoteLog) -> None:
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.report(alive("dead"))

    def on_read(read: int) -> None:
        clock.now += 6.0

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert report.late == ("dead",)
    assert MOST_LOST_S < report.stall_s < MOST_LOST_S + 20


def test_after_an_outage_a_cut_waits_for_workers_from_before_it(remote: RemoteLog) -> None:
    """The learner trained during the outage, and no worker has published since."""
    clock = Ticking()
    learner = Learner(remote, Table(0), clock=clock)
    remote.report(alive("a"))
    remote.answers = [flushing("a")]
    learner.interruption.cut(V0, digest(0))
    clock.now += 60.0
    remote.answers = []

    def on_read(read: int) -> None:
        if len(requests(remote)) == 2 and read == remote.reads >= 8:
            flushing("a", a_flush(1, 0))(remote, requests(remote)[-1])
            remote.on_read = None

    remote.on_read = on_read
    report = learner.interruption.cut(V0, digest(0))
    assert (report.answered, report.late, report.tokens_scored) == (("a",), (), 4)
