"""Reads what a run has left, touching nothing: it may be going on.

The order matters while it goes on: checkpoint, history, log, versions, leases. Each is written before the one it is
read after, or only grows, and a version is only swept away below a lease that is read later.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from palimpsest.common import run_folder
from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.offline import open_existing_bus, read_existing
from palimpsest.common.bus.port import Bus, Record
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    DeadLetter,
    RunFinished,
    SegmentFlushed,
    TrajectoryFinished,
    VersionApplied,
    VersionPublished,
    trajectory_id,
)
from palimpsest.common.rejected_record import FOREIGN, RejectedRecord
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import (
    FINISHED,
    Announced,
    Bounds,
    Evidence,
    Finding,
    Kind,
    Letter,
    Line,
    LogContents,
    LoggedRecord,
    Offer,
)
from palimpsest.services.audit.read_store import CheckpointSearch, choose, read_candidates, read_versions
from palimpsest.services.learner.ingest.validation import check_finished
from palimpsest.services.snapshot_store.offline import StorageClaims, open_offline

ANY_VERSION = Version(1 << 62)
"""Whether a version had been published when a trajectory came is judged from the history, not here."""


class _Line(Struct):
    version: int
    published: int
    batch: int
    groups: dict[str, list[int]]
    by_staleness: dict[str, Any]
    staleness_max: int | None
    trajectories: dict[str, Any]


@dataclass
class _Topics:
    """Reads topics and notes where they begin and end."""

    bus: Bus
    run: str
    bounds: dict[str, dict[int, Bounds]] = field(default_factory=dict)

    def records(self, topic: str) -> Iterator[tuple[Record, Any]]:
        """Each record with its message: None when it cannot be read or is another run's."""
        with self.bus.consumer(topic) as consumer:
            stands = {p: Bounds(end, end) for p, end in consumer.ends().items()}
        self.bounds[topic] = stands
        for record in read_existing(self.bus, topic):
            known = stands[record.partition]
            stands[record.partition] = Bounds(min(known.first, record.offset), max(known.end, record.offset + 1))
            try:
                message = message_in(record)
            except RejectedRecord:
                message = None
            yield record, message if message is not None and message.run == self.run else None

    def messages(self, topic: str) -> Iterator[Any]:
        """The run's own messages."""
        return (message for _, message in self.records(topic) if message is not None)


def read(config: RunConfig, home: Path, *, quick: bool) -> Evidence:
    """Everything there is of the run; `quick` leaves out reading what must be hashed. Raises UserError, Unavailable."""
    path, kept = home / run_folder.HISTORY, config.checkpoint_folder
    with asyncio.Runner() as runner:
        storage = runner.run(open_offline(config))
        with closing(open_existing_bus(config, StorageClaims(storage, runner))) as bus:
            candidates = runner.run(read_candidates(kept, storage))
            body = path.read_bytes() if path.exists() else b""
            checkpoints = runner.run(choose(kept, storage, candidates, quick=quick))
            lines, tail, damage = read_history(path, body, checkpoints)
            log = read_log(bus, config.run.id)
            versions = runner.run(read_versions(storage, quick=quick))
    return Evidence(
        run=config.run.id,
        samples=config.tasks.samples_per_group,
        max_staleness=config.learner.max_staleness,
        every=config.learner.checkpoint.every,
        log=log,
        checkpoint=checkpoints.in_force,
        lines=tuple(lines),
        tail=tuple(tail),
        damaged=checkpoints.damaged,
        stored=versions.stored,
        leases=versions.leases,
        epoch=candidates.epoch,
        commits=tuple((int(one.commit.version), one.commit.writer) for one in candidates.each),
        faults=(*candidates.faults, *checkpoints.faults, *damage, *versions.faults),
        notes=("objects and checkpoints were not read and hashed (--quick)",) if quick else (),
    )


def read_history(
    path: Path, body: bytes, checkpoints: CheckpointSearch
) -> tuple[list[Line], list[Line], list[Finding]]:
    """The lines that the checkpoint counts, those beyond, and what is wrong with the file."""
    length = checkpoints.history_bytes if checkpoints.in_force else 0
    findings = []
    if len(body) < length:
        findings.append(
            Finding(
                Kind.HISTORY_DAMAGED,
                f"{path} holds {len(body)} bytes, the checkpoint counts {length}: restore the file from a copy",
            )
        )
    counted, beyond = body[:length], body[length:]
    if counted and not counted.endswith(b"\n"):
        findings.append(
            Finding(Kind.HISTORY_DAMAGED, f"{path}: byte {length}, where the checkpoint ends, is inside a line")
        )
    parsed: list[list[Line]] = []
    number = 0
    for part in (counted, beyond):
        parsed.append([])
        for text in part.split(b"\n")[:-1]:  # what comes behind the last end of line is being written
            number += 1
            try:
                parsed[-1].append(_line(text))
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
                findings.append(
                    Finding(Kind.HISTORY_DAMAGED, f"{path}, line {number}: {error}: restore the file from a copy")
                )
    return parsed[0], parsed[1], findings


def _line(text: bytes) -> Line:
    line = msgspec.json.decode(text, type=_Line)
    counts = line.trajectories
    staleness = [int(s) for s in line.by_staleness]
    if line.staleness_max is not None:
        staleness.append(line.staleness_max)
    return Line(
        version=line.version,
        published=line.published,
        trained=tuple(trajectory_id(group, sample) for group, samples in line.groups.items() for sample in samples),
        batch=line.batch,
        staleness=(min(staleness, default=0), max(staleness, default=0)),
        counts={
            **{name: int(counts[name]) for name in ("offered", "trained", "dead_lettered", "pending")},
            "dropped": sum(counts["dropped"].values()),
        },
    )


def read_log(bus: Bus, run: str) -> LogContents:
    """What the log says of the run."""
    topics = _Topics(bus, run)
    log = _control(topics, LogContents())
    log = replace(
        log,
        applied=tuple(
            Announced(m.version, m.digest, by=m.worker)
            for m in topics.messages(WORKERS)
            if isinstance(m, VersionApplied) and m.accepted
        ),
        offers=tuple(
            Offer(offer.group, offer.index, offer.samples, (offer.environment, offer.task_seed))
            for offer in topics.messages(TASKS)
        ),
        heard=tuple(
            _heard(record, message)
            for record, message in topics.records(TRAJECTORIES)
            if not isinstance(message, SegmentFlushed)  # what becomes of the trajectory is told by another record
        ),
    )
    return _letters(topics, replace(log, bounds=topics.bounds))  # letters last: each is written before its record ends


def _control(topics: _Topics, log: LogContents) -> LogContents:
    announced, finished = [], False
    for message in topics.messages(CONTROL):
        match message:
            case VersionPublished():
                announced.append(Announced(message.version, message.digest))
                finished = False  # a run that was over may go on with more versions
            case RunFinished():
                finished = True
    return replace(log, announced=tuple(announced), finished=finished)


def _letters(topics: _Topics, log: LogContents) -> LogContents:
    letters: Sequence[DeadLetter] = list(topics.messages(DEAD_LETTERS))
    causes = {(letter.topic, letter.partition, letter.offset): letter.cause.value for letter in letters}
    return replace(
        log,
        letters=tuple(
            Letter(
                letter.partition,
                letter.offset,
                "" if letter.cause in FOREIGN else letter.headers.get("trajectory", ""),
            )
            for letter in letters
            if letter.topic == TRAJECTORIES
        ),
        causes=dict(Counter(causes.values()).most_common()),
    )


def _heard(record: Record, message: Any) -> LoggedRecord:
    if message is None:
        return LoggedRecord(record.partition, record.offset, sound=False)
    if not isinstance(message, TrajectoryFinished):
        return LoggedRecord(record.partition, record.offset, message.trajectory, message.reason.value)
    try:
        check_finished(message, ANY_VERSION)
    except MalformedTrajectory:
        return LoggedRecord(record.partition, record.offset, message.trajectory, FINISHED, sound=False)
    versions = [segment.version for segment in message.segments]
    return LoggedRecord(
        record.partition,
        record.offset,
        message.trajectory,
        FINISHED,
        oldest=min(versions, default=None),
        newest=max(versions, default=None),
    )
