"""A replica: reads trajectories and publishes their old log-probs, beside the learner (docs/algorithms/replica.md).

Replicas share the trajectories as members of one consumer group. An offset is committed after all scores of its record
are published. If a replica dies, another one reads its uncommitted records again. Scores that are published twice have
no effect.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from palimpsest.common import failpoints, logs
from palimpsest.common.arrays import Float32Array
from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.port import Bus, Consumer, Outgoing, Position, Record
from palimpsest.common.config.settings import LOG_LEVEL
from palimpsest.common.instruments import HEARTBEAT, AgeGauge, report_lag
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    CONTROL,
    OLD_LOGPROBS,
    TRAJECTORIES,
    ControlChanged,
    RunFinished,
    VersionPublished,
    encode,
)
from palimpsest.common.offset_tracker import OffsetTracker
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.common.run_end import RunEnd
from palimpsest.common.service import Status, Stop
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.staleness_bound import StalenessBound
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row
from palimpsest.services.learner.control.state import ControlState
from palimpsest.services.learner.ingest.decoding import decode_for_run
from palimpsest.services.learner.model.policy import vocabulary_size
from palimpsest.services.learner.old_logprobs.score_store import computed_of
from palimpsest.services.learner.old_logprobs.scoring import score
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.replica import instruments
from palimpsest.services.learner.replica.queue import ScoringJob, ScoringQueue
from palimpsest.services.learner.replica.records import rows_of

GROUP = "replica"
POLL_S = 0.25
POLL_RECORDS = 256
COMMIT_S = 0.25
DRAIN_S = 10.0
"""Limit for scoring the records already read after a stop is requested, in seconds."""


class ReplicaWorker:
    """Scores trajectories until the run is finished or a stop is requested."""

    def __init__(
        self,
        *,
        run: str,
        name: str,
        bus: Bus,
        device: torch.device,
        batch_tokens: int,
        max_staleness: int,
        versions: int,
        stop: Stop,
    ) -> None:
        """max_staleness: the learner's; versions: of the run; batch_tokens: of a pass, padding included."""
        self._first_bound, self._changes, self._bound = max_staleness, ControlState(), StalenessBound(max_staleness)
        self.newest = Version(-1)
        """Newest version that was announced."""
        self._end = RunEnd(versions)
        self._known: Mapping[int, int] = {}
        """Partition -> end of `control` at the start. Earlier records are older than this replica."""
        self._run, self._name, self._bus = run, name, bus
        self._device, self._batch_tokens, self._stop = device, batch_tokens, stop
        self._backlog, self._frontier = ScoringQueue(), OffsetTracker()
        self._committed: dict[int, int] = {}
        self._committed_at = float("-inf")
        self._assigned: frozenset[int] = frozenset()
        self._leave_by: float | None = None
        self._finished = False
        self._failure: UserError | None = None
        self._waiting_for: str | None = "the model"
        self._tokens = self._loads = 0
        self._skipped: dict[str, int] = {}
        self._resident: VersionedModel
        self._vocabulary: int
        self._check: ControlCheck
        self._control: Consumer
        self._requested: Consumer
        self._trajectories: Consumer

    def waiting_for(self) -> str | None:
        """What the replica waits for; None while it scores."""
        return self._waiting_for

    def status(self) -> Status:
        """For /v1/status."""
        return {
            "run": self._run,
            "replica": self._name,
            "version": self._resident.version if self._waiting_for is None else None,
            "partitions": sorted(self._assigned),
            "waiting": len(self._backlog),
            "scored_tokens": self._tokens,
            "loads": self._loads,
            "skipped": dict(self._skipped),
        }

    def fail(self, error: UserError) -> None:
        """End `work` with this error."""
        self._failure = error

    def work(self, resident: VersionedModel, control: ControlCheck) -> None:
        """Score until the run ends. control: checks the announcement of the end.

        Raises UserError if the store's weights are damaged or of another model, and the error of `fail`.
        """
        self._check = control
        self._resident, self._vocabulary = resident, vocabulary_size(resident.model)
        with (
            self._bus.consumer(CONTROL) as self._control,
            self._bus.consumer(OLD_LOGPROBS) as self._requested,
            self._bus.consumer(TRAJECTORIES, group=GROUP, member=self._name) as self._trajectories,
        ):
            self._requested.seek(self._requested.ends())  # skip requests from before the start of this replica
            self._read_history()
            self._waiting_for = None
            heartbeat = AgeGauge(HEARTBEAT.labels("replica"))
            while not self._finished and not self._stop.requested:
                heartbeat.restart()
                if self._failure is not None:
                    raise self._failure
                self._read_control()
                self._prioritize(self._read_requests())
                records = self._trajectories.poll(limit=POLL_RECORDS, timeout_s=POLL_S)
                report_lag(TRAJECTORIES, self._trajectories)
                self._update_assignment()
                for record in records:
                    self._take(record)
                self._score_all()
                self._commit()

    def _read_history(self) -> None:
        """Read the records of `control` from before the start, and note whether the run is over."""
        self._known = self._control.ends()
        while any(self._control.positions()[partition] < end for partition, end in self._known.items()):
            if self._stop.requested:
                return
            self._read_control(timeout_s=POLL_S)
        end = self._end.announced
        if end is not None and self._check.is_newest(end.writer):
            logger().info("the run is over: it trained all its versions, and no learner continues it")
            self._finished = True

    def _read_control(self, *, timeout_s: float = 0.0) -> None:
        """Note the newest version, and the end of the run if it is announced."""
        for record in self._control.poll(limit=POLL_RECORDS, timeout_s=timeout_s):
            history = record.offset < self._known[record.partition]
            try:
                message = decode_for_run(record, self._run)
                if not self._check.check(message, history=history):
                    continue
            except RejectedRecord:
                continue  # the worker that reads it dead-letters it
            self._end.observe(message)
            if isinstance(message, VersionPublished):
                self.newest = max(self.newest, message.version)
                if not history:
                    self._resident.expect(message.version)
            if isinstance(message, ControlChanged):
                self._changes = self._changes.after(message)
                self._bound = StalenessBound(self._first_bound, self._changes.bounds)
                if (level := self._changes.values.get(LOG_LEVEL)) is not None:
                    logs.set_level(str(level))
            if isinstance(message, RunFinished) and not history:
                logger().info("run finished", version=message.version)
                self._finished = True

    def _read_requests(self) -> list[Mapping[Version, Row]]:
        """Rows that batches have requested since the last call, by version."""
        requests = []
        while records := self._requested.poll(limit=POLL_RECORDS, timeout_s=0.0):
            requests += [rows for record in records for rows in self._rows(record)]
        return requests

    def _prioritize(self, requests: Iterable[Mapping[Version, Row]]) -> None:
        for rows in requests:
            self._backlog.prioritize(rows)
        instruments.WAITING.set(len(self._backlog))

    def _take(self, record: Record) -> None:
        """Queue the rows of a trajectory."""
        self._frontier.read(record.partition, record.offset)
        young = [rows for found in self._rows(record) if (rows := self._young(found))]
        for rows in young:
            self._backlog.add(rows, Position(record.partition, record.offset))
        if not young:
            self._frontier.resolve(record.partition, record.offset)
        instruments.WAITING.set(len(self._backlog))

    def _rows(self, record: Record) -> list[Mapping[Version, Row]]:
        """The rows to score of each token sequence of the record, by version; empty if the record cannot be used."""
        try:
            return rows_of(message_in(record), run=self._run, vocabulary=self._vocabulary)
        except RejectedRecord as error:  # the learner reads the same record and dead-letters it
            self._skip("unusable", 1)
            logger().warning(
                "record skipped",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                reason=str(error),
            )
            return []

    def _young(self, rows: Mapping[Version, Row]) -> Mapping[Version, Row]:
        """Leave out the versions whose tokens the learner will mask: the next batch is trained at the newest version or
        a later one. A batch that needs one all the same requests it."""
        young = {version: row for version, row in rows.items() if version >= self._bound.lowest(self.newest)}
        if len(young) < len(rows):
            self._skip("too_old", len(rows) - len(young))
        return young

    def _score_all(self) -> None:
        """Score all queued jobs, version by version.

        No trajectories are read meanwhile, so that every job is scored. Only requests of batches come first.
        """
        while versions := self._backlog.versions(self._resident.version):
            if self._must_leave():
                return
            self._score(versions[0], self._backlog.take(versions[0]))
            instruments.WAITING.set(len(self._backlog))

    def _score(self, version: Version, jobs: Sequence[ScoringJob]) -> None:
        if version < self._bound.lowest(self.newest) and not any(job.urgent for job in jobs):
            self._skip("too_old", len(jobs))
            for job in jobs:
                self._resolve(job)
            return
        try:
            self._load_version(version)
        except VersionMissing as error:
            logger().warning("version missing", version=version, trajectories=len(jobs), reason=str(error))
            self._skip("version_missing", len(jobs))
            for job in jobs:
                self._resolve(job)
            return
        left = {job.row: job for job in jobs}
        began = time.monotonic()
        for scored in score(self._resident.model, list(left), device=self._device, batch_tokens=self._batch_tokens):
            instruments.PASS_SECONDS.observe(time.monotonic() - began)
            failpoints.reach("replica.before_publishing")
            self._publish(scored, version)
            failpoints.reach("replica.after_publishing")
            for row, _ in scored:
                self._resolve(left.pop(row))
            self._poll_between_passes()
            if self._must_leave():
                return
            if requests := self._read_requests():
                self._backlog.put_back(left.values())
                self._prioritize(requests)
                return
            began = time.monotonic()

    def _load_version(self, version: Version) -> None:
        began = time.monotonic()
        if self._resident.load_version(version):
            seconds = time.monotonic() - began
            self._loads += 1
            instruments.LOADS.inc()
            instruments.LOAD_SECONDS.observe(seconds)
            instruments.VERSION.set(version)
            logger().info("version", version=version, load_ms=round(1e3 * seconds, 1))

    def _publish(self, scored: Sequence[tuple[Row, Float32Array]], version: Version) -> None:
        outgoing = []
        for row, values in scored:
            if np.isnan(values).any():
                self._skip("not_finite", 1)
                logger().error("log-probs are not finite", trajectory=row.trajectory, version=version)
                continue
            outgoing += [
                Outgoing(row.trajectory, encode(computed))
                for computed in computed_of(
                    row, values, run=self._run, by=self._name, version=version, digest=self._resident.digest
                )
            ]
            self._tokens += row.trainable
            instruments.TOKENS.inc(row.trainable)
        self._bus.publish(OLD_LOGPROBS, outgoing)
        instruments.PUBLISHED.inc(len(outgoing))

    def _resolve(self, job: ScoringJob) -> None:
        at = self._backlog.done(job)
        if at is not None and at.partition in self._assigned:
            self._frontier.resolve(at.partition, at.offset)

    def _poll_between_passes(self) -> None:
        """Between two passes: stay a member of the group, note the end of the run, commit the records that are done."""
        self._read_control()
        self._trajectories.poll(limit=0, timeout_s=0.0)
        self._update_assignment()
        if time.monotonic() - self._committed_at > COMMIT_S:
            self._commit()

    def _update_assignment(self) -> None:
        """Forget the partitions that were assigned to another replica."""
        mine = self._trajectories.assignment()
        for partition in self._assigned - mine:
            self._frontier.forget(partition)
            self._backlog.forget(partition)
            self._committed.pop(partition, None)
        self._assigned = mine

    def _commit(self) -> None:
        offsets = self._frontier.offsets()
        if offsets != self._committed:
            self._trajectories.commit(offsets)
            self._committed = offsets
        self._committed_at = time.monotonic()

    def _must_leave(self) -> bool:
        """Whether the run is over or the time to drain has passed."""
        if self._finished:
            return True
        if not self._stop.requested:
            return False
        if self._leave_by is None:
            self._leave_by = time.monotonic() + DRAIN_S
            self._waiting_for = "the records already read, before it stops"
            logger().info("draining", waiting=len(self._backlog))
        return time.monotonic() > self._leave_by

    def _skip(self, reason: str, trajectories: int) -> None:
        self._skipped[reason] = self._skipped.get(reason, 0) + trajectories
        instruments.SKIPPED.labels(reason).inc(trajectories)
