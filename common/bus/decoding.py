"""Conversion of records to messages: decode a record, and make a dead letter of one that cannot be used."""

from typing import Any

from palimpsest.common.bus.claim_check import LOST
from palimpsest.common.bus.port import UNREADABLE, Record
from palimpsest.common.messages import DeadLetter, decode
from palimpsest.common.rejected_record import RejectCause, RejectedRecord

MOST_COPIED_BYTES = 1 << 20
"""Longest body that a dead letter copies."""
MOST_KEY_CHARS = 1 << 10
"""Longest key that a dead letter copies. The keys of a run are ids and names."""
MOST_HEADER_CHARS = 1 << 14
"""Longest headers that a dead letter copies, names and values together."""
TRAJECTORY = "trajectory"
"""Header of a record on `trajectories`: the id, for a reader that cannot decode the body."""
OMITTED = "body_omitted"
"""Header of a dead letter without the body of its record: number of bytes of that body."""


def message_in(record: Record) -> Any:
    """Return the message in this record. Raises RejectedRecord if the body is lost or is no message of the topic."""
    if UNREADABLE in record.headers and not record.body:
        raise RejectedRecord(RejectCause.UNDECODABLE, f"{record.topic}: {record.headers[UNREADABLE]}")
    if LOST in record.headers:
        raise RejectedRecord(RejectCause.MISSING_CLAIM, f"{record.topic}: the body is lost: {record.headers[LOST]}")
    return decode(record.topic, record.body)


def dead_letter(run: str, record: Record, error: RejectedRecord, *, now: float) -> DeadLetter:
    """Return the dead letter of a record that cannot be used. `now`: Unix seconds.

    A long record is not copied, so that a flood of long records does not fill the topic; the letter names the original.
    A long body is left out alone. With a long key or long headers the letter holds the start of the key and, of the
    headers, only the trajectory's id, which the audit counts.
    """
    named = len(record.key) <= MOST_KEY_CHARS and _header_chars(record) <= MOST_HEADER_CHARS
    copied = named and len(record.body) <= MOST_COPIED_BYTES
    kept = {
        name: value
        for name, value in record.headers.items()
        if named or (name == TRAJECTORY and len(value) <= MOST_KEY_CHARS)
    }
    return DeadLetter(
        run=run,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key[:MOST_KEY_CHARS],
        headers=kept | ({} if copied else {OMITTED: str(len(record.body))}),
        body=record.body if copied else b"",
        cause=error.cause,
        reason=str(error),
        buried_at=now,
    )


def _header_chars(record: Record) -> int:
    """Return the length of the headers, names and values together."""
    return sum(len(name) + len(value) for name, value in record.headers.items())
