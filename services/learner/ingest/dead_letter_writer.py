"""Writes dead letters: records that the learner cannot use, kept unchanged with their cause."""

import time
from collections.abc import Callable

from palimpsest.common.bus.decoding import dead_letter
from palimpsest.common.bus.port import Bus, Outgoing, Record
from palimpsest.common.logs import logger
from palimpsest.common.messages import DEAD_LETTERS, encode
from palimpsest.common.rejected_record import RejectedRecord
from palimpsest.services.learner import instruments


class DeadLetterWriter:
    """Publishes to topic `dead_letters`.

    `confirm` raises Fenced unless the run still belongs to this learner. A learner that was replaced sees its
    successor's records as unknown and must not dead-letter them.
    """

    def __init__(self, bus: Bus, *, run: str, confirm: Callable[[], None]) -> None:
        self._bus, self._run, self._confirm = bus, run, confirm

    def write(self, record: Record, error: RejectedRecord) -> None:
        """Publish a dead letter with the record. It is durable when this returns. Raises Fenced."""
        self._confirm()
        logger().warning(
            "dead letter", topic=record.topic, partition=record.partition, offset=record.offset,
            cause=error.cause.value, reason=str(error),
        )  # fmt: skip
        letter = dead_letter(self._run, record, error, now=time.time())
        self._bus.publish(DEAD_LETTERS, [Outgoing(letter.key, encode(letter))])
        instruments.DEAD_LETTERS.labels(error.cause.value, record.topic).inc()
