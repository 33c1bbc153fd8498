"""Validates the values of records that a worker reads. Pure.

A record that decodes can still hold values that no learner publishes, and acting on them would stop the worker.
"""

import math

from palimpsest.common.messages import Control, CutReleased, CutRequested, GroupOffered
from palimpsest.common.rejected_record import RejectCause, RejectedRecord


def validate(message: GroupOffered | Control) -> None:
    """Raise RejectedRecord for a negative version or cut, or an offer with sampling limits that are not positive."""
    if isinstance(message, CutRequested | CutReleased) and message.cut < 0:
        raise RejectedRecord(RejectCause.OUT_OF_RANGE, f"cut is {message.cut}; it must be at least 0")
    if isinstance(message, CutReleased):
        return
    if message.version < 0:
        raise RejectedRecord(RejectCause.NEGATIVE_VERSION, f"version is {message.version}; it must be at least 0")
    if not isinstance(message, GroupOffered):
        return
    sampling = message.sampling
    numbers = {
        "temperature": sampling.temperature,
        "time_limit_s": message.time_limit_s,
        "samples": message.samples,
        "max_turn_tokens": sampling.max_turn_tokens,
        "max_trajectory_tokens": sampling.max_trajectory_tokens,
        "max_turns": sampling.max_turns,
    }
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise RejectedRecord(
                RejectCause.NOT_FINITE, f"group {message.group}: {name} is {number}; it must be finite"
            )
        if number <= 0:
            raise RejectedRecord(
                RejectCause.OUT_OF_RANGE, f"group {message.group}: {name} is {number}; it must be above 0"
            )
