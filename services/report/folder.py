"""Reads a run's folder for the summary and the report; the run may be active.

The newest checkpoint is the reference: a restart would undo later history lines and ledger entries. Before the first
checkpoint, the history alone counts.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
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
from palimpsest.common.bus.port import Bus
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.evaluation.lines import evaluation_lines
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    ControlChanged,
    SegmentFlushed,
    VersionApplied,
    WorkerAlive,
)
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.trajectory import trainable
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.buffer.ledger import LedgerState
from palimpsest.services.learner.checkpointing.manifest import MANIFEST, complete
from palimpsest.services.report.history_line import Line, UnreadableLine, parse_line
from palimpsest.services.snapshot_store.offline import StorageClaims, open_offline


class Seconds(Struct, frozen=True):
    """Wall-clock seconds of a run on one machine, over all its starts."""

    setup: float = 0.0
    """Seconds from each start until a worker could sample."""
    run: float = 0.0
    """The remaining seconds."""


class CheckpointSummary(Struct, frozen=True):
    """The values of the newest checkpoint that the report needs."""

    ledger: LedgerState
    history_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LogSummary:
    """The log's records about workers and trajectories."""

    alive: tuple[WorkerAlive, ...] = ()
    applied: tuple[VersionApplied, ...] = ()
    offered: int = 0
    """Offered trajectories."""
    records: int = 0
    """Records of ended trajectories, including repeats."""
    duplicates: int = 0
    """Records of a trajectory that has an earlier record."""
    tokens: int = 0
    """Tokens of finished trajectories: prompts, tool output and sampled tokens."""
    trainable_tokens: int = 0
    bytes: int = 0
    """Size of all records' bodies."""
    changes: tuple[ControlChanged, ...] = ()
    """Changes that people requested, in the order of the log."""
    dead_letters: Mapping[str, int] | None = None
    """Topic -> unusable records; None if there is no log."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a run's folder."""

    folder: Path
    config: RunConfig
    lines: tuple[Line, ...] = ()
    checkpoint: CheckpointSummary | None = None
    seconds: Seconds | None = None
    log: LogSummary = field(default_factory=LogSummary)
    evaluations: tuple[dict[str, Any], ...] = ()
    """Lines of evaluations.jsonl."""


def contents(folder: Path) -> Contents:
    """Read the folder. Raises UserError if it is not the folder of a run or its history is damaged."""
    config = read_run_config(folder)
    checkpoint = newest_checkpoint(config.checkpoint_folder)  # before the history, which only grows
    return Contents(
        folder=folder,
        config=config,
        lines=tuple(history(folder / run_folder.HISTORY, length=checkpoint.history_bytes if checkpoint else None)),
        checkpoint=checkpoint,
        seconds=read_seconds(folder / run_folder.SECONDS),
        log=_read_log(config),
        evaluations=tuple(evaluation_lines(folder)),
    )


def read_run_config(folder: Path) -> RunConfig:
    """Read the run's configuration, with default paths relative to the folder's current place."""
    if not (folder / run_folder.RUN_FILE).is_file():
        raise UserError(f"{folder}: not the folder of a run (it has no {run_folder.RUN_FILE})")
    config = load([str(folder / run_folder.RUN_FILE)], {}, program="").config
    checkpoint = config.learner.checkpoint
    checkpoint = checkpoint.model_copy(update={"folder": checkpoint.folder or folder / run_folder.CHECKPOINTS})
    return config.model_copy(
        update={
            "bus": config.bus.model_copy(update={"path": config.bus.path or folder / run_folder.BUS}),
            "learner": config.learner.model_copy(update={"checkpoint": checkpoint}),
        }
    )


def history(path: Path, *, length: int | None = None) -> Iterator[Line]:
    """Yield the lines of the first `length` bytes (default: all), without an incomplete last line.

    Raises UserError for a line before it that cannot be read or lacks a key.
    """
    try:
        body = path.read_bytes()[:length]
    except FileNotFoundError:
        return
    whole = body.split(b"\n")[:-1]
    for number, line in enumerate(whole, start=1):
        try:
            yield parse_line(line)
        except UnreadableLine as error:
            raise UserError(f"{path}, line {number}: {error}. Restore the file from a copy", ExitCode.DAMAGED) from None


def newest_checkpoint(folder: Path) -> CheckpointSummary | None:
    """Return the newest checkpoint with a readable manifest; None if there is none."""
    for checkpoint in reversed(complete(folder)):
        try:
            return msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=CheckpointSummary)
        except (OSError, msgspec.DecodeError):
            continue  # deleted meanwhile, or damaged: the learner ignores it as well, with a warning
    return None


def read_seconds(path: Path) -> Seconds | None:
    """Read seconds.json; None if there is none, as for services started by hand."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Seconds)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _read_log(config: RunConfig) -> LogSummary:
    if config.bus.kind == "sqlite" and not config.bus_path.is_file():
        return LogSummary()
    with asyncio.Runner() as runner:
        storage = runner.run(open_offline(config))
        with closing(open_existing_bus(config, StorageClaims(storage, runner))) as bus:
            return _read(bus, config)


def _read(bus: Bus, config: RunConfig) -> LogSummary:
    alive, applied = [], []
    for _, message in _messages(bus, WORKERS, config.run.id):
        match message:
            case WorkerAlive():
                alive.append(message)
            case VersionApplied():
                applied.append(message)
    offers = (message for _, message in _messages(bus, TASKS, config.run.id))
    offered = sum(message.samples for message in offers if not message.evaluation)
    log = LogSummary(
        tuple(alive),
        tuple(applied),
        offered,
        changes=tuple(m for _, m in _messages(bus, CONTROL, config.run.id) if isinstance(m, ControlChanged)),
        dead_letters=_count_dead_letters(bus, config.run.id),
    )
    return _count_trajectories(bus, config.run.id, log)


def _count_dead_letters(bus: Bus, run: str) -> dict[str, int]:
    """Return topic -> records. Every reader of a topic writes its own dead letter, and another one after a restart."""
    letters = (message for _, message in _messages(bus, DEAD_LETTERS, run))
    found = {(letter.topic, letter.partition, letter.offset) for letter in letters}
    return dict(sorted(Counter(topic for topic, _, _ in found).items()))


def _count_trajectories(bus: Bus, run: str, log: LogSummary) -> LogSummary:
    records = tokens = sampled = size = 0
    known: set[str] = set()
    for length, message in _messages(bus, TRAJECTORIES, run):
        size += length
        if is_evaluation(message.group):
            continue  # not of the training
        if isinstance(message, SegmentFlushed):
            continue  # its tokens occur again in the record of the trajectory's end
        records += 1
        known.add(message.trajectory)
        if hasattr(message, "tokens"):
            for part in sequences(message):
                tokens += len(part.tokens) // 4
                sampled += trainable(part.segments)
    return replace(
        log,
        records=records,
        duplicates=records - len(known),
        tokens=tokens,
        trainable_tokens=sampled,
        bytes=size,
    )


def _messages(bus: Bus, topic: str, run: str) -> Iterator[tuple[int, Any]]:
    """Yield length and message of each readable record of the run; dead letters cover the others."""
    for record in read_existing(bus, topic):
        try:
            message = message_in(record)
        except RejectedRecord:
            continue
        if message.run == run:
            yield len(record.body), message
