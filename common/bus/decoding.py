"""Between records of the log and messages: decoding a record, and dead-lettering one that cannot be used."""

from typing import Any

from palimpsest.common.bus.claim_check import LOST
from palimpsest.common.bus.port import Record
from palimpsest.common.messages import DeadLetter, decode
from palimpsest.common.rejected_record import RejectCause, RejectedRecord


def message_in(record: Record) -> Any:
    """The message in this record. Raises RejectedRecord: the body is lost or is not a record of the topic."""
    if LOST in record.headers:
        raise RejectedRecord(RejectCause.MISSING_CLAIM, f"{record.topic}: its body is lost: {record.headers[LOST]}")
    return decode(record.topic, record.body)


def dead_letter(run: str, record: Record, error: RejectedRecord, *, now: float) -> DeadLetter:
    """The dead letter of a record that cannot be used. `now`: Unix seconds."""
    return DeadLetter(
        run=run,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        headers=dict(record.headers),
        body=record.body,
        cause=error.cause,
        reason=str(error),
        buried_at=now,
    )
