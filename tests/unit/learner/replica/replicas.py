"""A replica with a real log, a real store, and the tiny model; and records for it to score."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.common.arrays import pack_int32
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    OLD_LOGPROBS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    OldLogprobsComputed,
    OldLogprobsRequested,
    SegmentFlushed,
    TrajectoryFinished,
    VersionPublished,
    decode,
    encode,
)
from palimpsest.common.service import Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.ingest.dead_letter_writer import DeadLetterWriter
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.score_reader import ScoreReader, WaitLimits
from palimpsest.services.learner.old_logprobs.score_store import ScoreStore
from palimpsest.services.learner.old_logprobs.snapshot_source import SnapshotSource
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.replica.worker import ReplicaWorker
from tests.learner_parts.models import CPU, canaries, load, perturb
from tests.processes.waiting import LIMIT_S
from tests.records.builders import a_finished, a_row, a_segment
from tests.servers.stores import eventually

TOPICS = {TASKS: 1, TRAJECTORIES: 2, CONTROL: 1, WORKERS: 1, OLD_LOGPROBS: 2, DEAD_LETTERS: 1}
BATCH_TOKENS = 64
VERSIONS = 3


class Setup:
    """Three versions in the store and on the log, and a replica's model."""

    def __init__(self, folder: Path, store: SnapshotClient, bus: SqliteBus) -> None:
        self.folder, self.store, self.bus = folder, store, bus
        self.newest = load(folder)
        for version in range(3):
            perturb(self.newest, by=0.05, seed=version)
            manifest = store.put(
                "test", Version(version), raw_tensors(named_weights(self.newest)), canaries(self.newest), writer=1
            )
            published = VersionPublished(
                run="test", version=Version(version), digest=manifest.digest, published_at=0.0, writer=1
            )  # fmt: skip
            bus.publish(CONTROL, [Outgoing("test", encode(published))])
        self.announcement = published
        """Of the newest version."""
        self.max_staleness = 100
        self.source = SnapshotSource(self.newest, store, CPU, max_tokens=10_000, loaded=lambda _: None)

    def replica(self, name: str, stop: Stop, bus: SqliteBus | None = None) -> ReplicaWorker:
        return ReplicaWorker(
            run="test", name=name, bus=bus or self.bus, device=CPU, batch_tokens=BATCH_TOKENS, stop=stop,
            max_staleness=self.max_staleness, versions=VERSIONS,
        )  # fmt: skip

    def trajectories(self, *records: TrajectoryFinished | SegmentFlushed) -> None:
        self.bus.publish(TRAJECTORIES, [Outgoing(record.group, encode(record)) for record in records])

    def scores(self) -> list[OldLogprobsComputed]:
        return [message for message in self._messages() if isinstance(message, OldLogprobsComputed)]

    def requests(self) -> list[OldLogprobsRequested]:
        return [message for message in self._messages() if isinstance(message, OldLogprobsRequested)]

    def _messages(self) -> list[Any]:
        with self.bus.consumer(OLD_LOGPROBS) as consumer:
            records = consumer.poll(limit=10_000, timeout_s=0.0)
        return [decode(OLD_LOGPROBS, record.body) for record in records]


class RunningReplica:
    """A replica that runs in a thread; leaving the context stops it and joins the thread."""

    def __init__(self, setup: Setup, name: str = "replica-0", bus: SqliteBus | None = None) -> None:
        self.stop = Stop()
        self.replica = setup.replica(name, self.stop, bus)
        self._store = setup.store
        self._resident = VersionedModel(load(setup.folder), setup.store)
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            self.replica.work(self._resident, ControlCheck(self._store))
        except BaseException as error:  # join() raises it in the test's thread
            self._error = error

    def __enter__(self) -> "RunningReplica":
        self.thread.start()
        eventually(lambda: self.replica.waiting_for() is None)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.request()
        self.join()

    def join(self) -> None:
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        if self._error is not None:
            raise self._error


def finished(index: int, sample: int, segments: tuple[Segment, ...], tokens: int = 14) -> TrajectoryFinished:
    """Return a finished trajectory with tokens that differ from those of other trajectories."""
    message = a_finished(index, sample, segments=segments, tokens=tokens)
    generator = torch.Generator().manual_seed(100 * index + sample)
    drawn = torch.randint(3, 250, (tokens,), generator=generator).tolist()
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return TrajectoryFinished(**fields | {"tokens": pack_int32(drawn), "temperature": 0.7})


MIXED = (a_segment(2, 5, 0), a_segment(5, 8, 1), a_segment(10, 14, 2))


def some_records() -> list[TrajectoryFinished]:
    return [
        finished(0, 0, MIXED),
        finished(0, 1, (a_segment(3, 9, 0),), tokens=12),
        finished(1, 0, (a_segment(1, 4, 1), a_segment(6, 11, 1)), tokens=11),
        finished(1, 1, MIXED),
        finished(2, 0, (a_segment(4, 6, 2),), tokens=7),
    ]


def spans_of(message: TrajectoryFinished) -> set[tuple[str, int, int, int]]:
    return {(message.trajectory, s.start, s.stop, int(s.version)) for s in message.segments}


def keys(scores: list[OldLogprobsComputed]) -> set[tuple[str, int, int, int]]:
    return {(c.trajectory, c.start, c.stop, int(c.version)) for c in scores}


def to_row(message: TrajectoryFinished) -> Row:
    tokens = np.frombuffer(message.tokens, dtype=np.int32)
    versions = np.full(len(tokens), -1, dtype=np.int32)
    for segment in message.segments:
        versions[segment.start : segment.stop] = segment.version
    return a_row(message.trajectory, tokens.tolist(), versions.tolist(), temperature=message.temperature)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_reader(
    setup: Setup,
    *,
    wait_s: float = 60.0,
    first_wait_s: float = 0.0,
    clock: Clock | None = None,
    resolved: frozenset[str] = frozenset(),
) -> tuple[ScoreReader, ScoreStore]:
    scores = ScoreStore()
    dead_letters = DeadLetterWriter(setup.bus, run="test", confirm=lambda: None)
    reader = ScoreReader(
        setup.bus, scores, dead_letters, WaitLimits(wait_s, first_wait_s), run="test",
        wanted=lambda name: name not in resolved, confirm=lambda: None, clock=clock or Clock(),
        control=ControlCheck(setup.store),
    )  # fmt: skip
    return reader, scores
