"""Turns the records that a worker reads into messages. A record that cannot be used becomes a dead letter."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from palimpsest.common.bus.decoding import dead_letter, message_in
from palimpsest.common.bus.port import Record
from palimpsest.common.evaluation.tasks import is_evaluation
from palimpsest.common.logs import logger
from palimpsest.common.messages import Control, GroupOffered
from palimpsest.common.rejected_record import RejectCause, RejectedRecord
from palimpsest.common.run_end import RunEnd
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.trajectory_limit import TrajectoryLimit
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.outbox import Outbox
from palimpsest.services.rollout.validation import validate


class RecordReader:
    """Reads the records of one run.

    control: checks that they are of the learner that has the run. limit: of the trajectories of this worker. samples:
    most trajectories of a group, and of one of an evaluation.
    """

    def __init__(
        self,
        run: str,
        outbox: Outbox,
        control: ControlCheck,
        limit: TrajectoryLimit,
        *,
        samples: tuple[int, int],
        worker: str,
    ) -> None:
        self._run, self._outbox, self._control = run, outbox, control
        self._limit, self._samples, self._worker = limit, samples, worker
        self._limit_agreed = False
        """Whether the learner has offered trajectories of the worker's limit."""

    async def read_offer(
        self, record: Record, done: Callable[[], None], *, history: bool = False
    ) -> GroupOffered | None:
        """Return the record's offer, or None after its dead letter was queued. `done` is called once that is durable.

        An offer of a version that the store never held is rejected: the worker would wait for the version forever. So
        is one of a learner that the store does not know, or of more trajectories than a group of the run has.
        history: the record is older than the worker.
        Raises UserError if the learner offers trajectories of another limit. After an offer of the worker's limit only
        another program can write such an offer, which is rejected.
        """
        try:
            offer: GroupOffered = self._decode(record)
            if self._control.asks_store(offer):
                await asyncio.to_thread(self._control.check_offer, offer, history=history)
            else:
                self._control.check_offer(offer, history=history)
            self._check_samples(offer)
            self._check_limit(offer)
        except RejectedRecord as error:
            self._dead_letter(record, error, done)
            return None
        return offer

    async def read_control(self, record: Record, *, history: bool) -> Control | None:
        """Return the record's message, or None if it is of a replaced learner or after its dead letter was queued.

        history: the record is older than the worker.
        """
        try:
            message: Control = self._decode(record)
            if self._control.asks_store(message):
                current = await asyncio.to_thread(self._control.check, message, history=history)
            else:
                current = self._control.check(message, history=history)
        except RejectedRecord as error:
            self._dead_letter(record, error, lambda: None)
            return None
        if not current:
            logger().info("record of a replaced learner", offset=record.offset, writer=message.writer)
        return message if current else None

    async def is_over(self, end: RunEnd) -> bool:
        """Whether the run has ended and no learner continues it."""
        found = end.announced
        return found is not None and await asyncio.to_thread(self._control.is_newest, found.writer)

    def _check_samples(self, offer: GroupOffered) -> None:
        most = self._samples[offer.evaluation]
        key = "evaluation.samples" if offer.evaluation else "tasks.samples_per_group"
        if offer.samples > most:
            raise RejectedRecord(
                RejectCause.OUT_OF_RANGE,
                f"group {offer.group}: samples is {offer.samples}; {key} is {most} on {self._worker}",
            )
        if offer.evaluation != is_evaluation(offer.group):
            raise RejectedRecord(
                RejectCause.CONTRADICTS_OFFER,
                f"group {offer.group[:32]}: evaluation is {offer.evaluation}, but its id says otherwise",
            )

    def _check_limit(self, offer: GroupOffered) -> None:
        offered = offer.sampling.max_trajectory_tokens
        if offered == self._limit.tokens:
            self._limit_agreed = True
        elif self._limit_agreed:
            raise RejectedRecord(
                RejectCause.OUT_OF_RANGE,
                f"group {offer.group}: max_trajectory_tokens is {offered}; earlier offers have {self._limit.tokens}",
            )
        else:
            self._limit.refuse_other(offered, worker=self._worker)

    def _decode(self, record: Record) -> Any:
        """Return the record's message. Raises RejectedRecord."""
        message = message_in(record)
        if message.run != self._run:
            raise RejectedRecord(RejectCause.WRONG_RUN, f"the record belongs to run {message.run}, not {self._run}")
        validate(message)
        return message

    def _dead_letter(self, record: Record, error: RejectedRecord, done: Callable[[], None]) -> None:
        logger().error(
            "dead letter", topic=record.topic, partition=record.partition, offset=record.offset,
            cause=error.cause.value, reason=str(error),
        )  # fmt: skip
        self._outbox.put_dead_letter(dead_letter(self._run, record, error, now=time.time()), done=done)
        instruments.DEAD_LETTERS.labels(error.cause.value, record.topic).inc()
