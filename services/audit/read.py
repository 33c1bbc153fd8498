"""Reads the evidence of a run without changing it; the run may be active.

The order of reading matters for an active run: checkpoint, history, log, versions, leases. Each of them either is
written before the one that is read before it, or only grows. The store deletes a version only below a lease, and leases
are read last.
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
from palimpsest.common.branches import sequences
from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.offline import open_existing_bus, read_existing
from palimpsest.common.bus.port import Bus, Record
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    ControlChanged,
    DeadLetter,
    DropReason,
    RunFinished,
    SegmentFlushed,
    TrajectoryFinished,
    VersionApplied,
    VersionPublished,
    trajectory_id,
)
from palimpsest.common.rejected_record import FOREIGN, RejectedRecord
from palimpsest.common.trajectory import MalformedTrajectory
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
from palimpsest.services.audit.read_evaluations import evaluation_offer, evaluation_record, read_evaluations
from palimpsest.services.audit.read_store import CheckpointSearch, choose, read_candidates, read_versions
from palimpsest.services.audit.validity import check_record
from palimpsest.services.learner.control.state import ControlState
from palimpsest.services.snapshot_store.offline import StorageClaims, open_offline


class _Line(Struct):
    version: int
    published: int
    batch: int
    groups: dict[str, list[int]]
    by_staleness: dict[str, Any]
    staleness_max: int | None
    trajectories: dict[str, Any]
    masked_tokens: dict[str, int] = {}


@dataclass
class _Topics:
    """Reads topics and notes their bounds."""

    bus: Bus
    run: str
    bounds: dict[str, dict[int, Bounds]] = field(default_factory=dict)

    def read_records(self, topic: str) -> Iterator[tuple[Record, Any]]:
        """Yield each record with its message; None if the record is unreadable or of another run."""
        with self.bus.consumer(topic) as consumer:
            bounds = {p: Bounds(end, end) for p, end in consumer.ends().items()}
        self.bounds[topic] = bounds
        for record in read_existing(self.bus, topic):
            known = bounds[record.partition]
            bounds[record.partition] = Bounds(min(known.first, record.offset), max(known.end, record.offset + 1))
            try:
                message = message_in(record)
            except RejectedRecord:
                message = None
            yield record, message if message is not None and message.run == self.run else None

    def read_messages(self, topic: str) -> Iterator[Any]:
        """Yield the messages of this run."""
        return (message for _, message in self.read_records(topic) if message is not None)


def read(config: RunConfig, home: Path, *, quick: bool) -> Evidence:
    """Read all evidence of the run. `quick` omits files that must be hashed. Raises UserError, Unavailable."""
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
    evaluations, unreadable = read_evaluations(home)
    return Evidence(
        run=config.run.id,
        samples=config.tasks.samples_per_group,
        max_staleness=config.learner.max_staleness,
        every=config.learner.checkpoint.every,
        log=log,
        checkpoint=checkpoints.in_force,
        lines=tuple(lines),
        tail=tuple(tail),
        evaluations=evaluations,
        damaged=checkpoints.damaged,
        stored=versions.stored,
        leases=versions.leases,
        epoch=candidates.epoch,
        commits=tuple((int(one.commit.version), one.commit.writer) for one in candidates.each),
        faults=(*candidates.faults, *checkpoints.faults, *damage, *versions.faults, *unreadable),
        notes=("objects and checkpoints were not read and hashed (--quick)",) if quick else (),
    )


def read_history(
    path: Path, body: bytes, checkpoints: CheckpointSearch
) -> tuple[list[Line], list[Line], list[Finding]]:
    """Return the lines that the checkpoint includes, the lines after it, and findings about the file."""
    length = checkpoints.history_bytes if checkpoints.in_force else 0
    findings = []
    if len(body) < length:
        findings.append(
            Finding(
                Kind.HISTORY_DAMAGED,
                f"{path} holds {len(body)} bytes, the checkpoint counts {length}: restore the file from a backup",
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
        for text in part.split(b"\n")[:-1]:  # the part after the last newline is being written
            number += 1
            try:
                parsed[-1].append(_parse_line(text))
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
                findings.append(
                    Finding(Kind.HISTORY_DAMAGED, f"{path}, line {number}: {error}: restore the file from a backup")
                )
    return parsed[0], parsed[1], findings


def _parse_line(text: bytes) -> Line:
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
        too_old=line.masked_tokens.get(DropReason.OVER_STALENESS.value),
    )


def read_log(bus: Bus, run: str) -> LogContents:
    """Read the run's records on the log."""
    topics = _Topics(bus, run)
    log = _read_control(topics, LogContents(), _rejected(bus, run, CONTROL))
    log = replace(
        log,
        applied=tuple(
            Announced(m.version, m.digest, by=m.worker)
            for m in topics.read_messages(WORKERS)
            if isinstance(m, VersionApplied) and m.accepted
        ),
    )
    log = _read_trajectories(topics, _read_offers(topics, log))
    return _read_letters(
        topics, replace(log, bounds=topics.bounds)
    )  # dead letters last: each is written before its record counts as read


def _read_offers(topics: _Topics, log: LogContents) -> LogContents:
    training, evaluations = [], []
    for offer in topics.read_messages(TASKS):
        if offer.evaluation:
            evaluations.append(evaluation_offer(offer))
        else:
            training.append(Offer(offer.group, offer.index, offer.samples, (offer.environment, offer.task_seed)))
    return replace(log, offers=tuple(training), evaluation_offers=tuple(evaluations))


def _read_trajectories(topics: _Topics, log: LogContents) -> LogContents:
    arrivals, evaluations = [], []
    for record, message in topics.read_records(TRAJECTORIES):
        if isinstance(message, SegmentFlushed):
            continue  # another record has the end of the trajectory
        if message is not None and is_evaluation(message.group):
            evaluations.append(evaluation_record(message))
        else:
            arrivals.append(_logged_record(record, message))
    return replace(log, arrivals=tuple(arrivals), evaluation_records=tuple(evaluations))


def _rejected(bus: Bus, run: str, topic: str) -> set[tuple[int, int]]:
    """Positions of the records of a topic that a reader rejected."""
    letters = _Topics(bus, run).read_messages(DEAD_LETTERS)
    return {(letter.partition, letter.offset) for letter in letters if letter.topic == topic}


def _read_control(topics: _Topics, log: LogContents, rejected: set[tuple[int, int]]) -> LogContents:
    announced, finished, changes = [], False, ControlState()
    for record, message in topics.read_records(CONTROL):
        if (record.partition, record.offset) in rejected:
            continue  # for example, another program made up an announcement
        match message:
            case VersionPublished():
                announced.append(Announced(message.version, message.digest))
                finished = False  # a finished run can be resumed with more versions
            case RunFinished():
                finished = True
            case ControlChanged():
                changes = changes.after(message)
    return replace(log, announced=tuple(announced), finished=finished, staleness_changes=changes.bounds)


def _read_letters(topics: _Topics, log: LogContents) -> LogContents:
    letters: Sequence[DeadLetter] = list(topics.read_messages(DEAD_LETTERS))
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


def _logged_record(record: Record, message: Any) -> LoggedRecord:
    if message is None:
        return LoggedRecord(record.partition, record.offset, sound=False)
    if not isinstance(message, TrajectoryFinished):
        return LoggedRecord(record.partition, record.offset, message.trajectory, message.reason.value)
    try:
        check_record(message)
    except MalformedTrajectory:
        return LoggedRecord(record.partition, record.offset, message.trajectory, FINISHED, sound=False)
    tokens = Counter[int]()
    for segment in (segment for part in sequences(message) for segment in part.segments):
        tokens[segment.version] += len(segment)
    return LoggedRecord(
        record.partition,
        record.offset,
        message.trajectory,
        FINISHED,
        oldest=min(tokens, default=None),
        newest=max(tokens, default=None),
        tokens=tokens,
    )
