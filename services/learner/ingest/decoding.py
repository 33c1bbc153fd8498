"""Decodes the records of one run."""

from typing import Any

from palimpsest.common.bus.decoding import message_in
from palimpsest.common.bus.port import Record
from palimpsest.common.rejected_record import RejectCause, RejectedRecord


def decode_for_run(record: Record, run: str) -> Any:
    """The record's message. Raises RejectedRecord if it cannot be decoded or belongs to another run."""
    message = message_in(record)
    if message.run != run:
        raise RejectedRecord(RejectCause.WRONG_RUN, f"the record is of run {message.run}, not of {run}")
    return message
