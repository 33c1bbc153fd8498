"""Whether what a worker is told makes sense. Pure.

A record that decodes can still ask for what no learner asks for; acted on, it would stop the worker for good.
"""

import math

from palimpsest.common.messages import Control, CutReleased, CutRequested, GroupOffered
from palimpsest.common.rejected_record import RejectCause, RejectedRecord


def validate(message: GroupOffered | Control) -> None:
    """Raise RejectedRecord for a version or a cut below 0, or an offer that nothing can be sampled for."""
    if isinstance(message, CutRequested | CutReleased) and message.cut < 0:
        raise RejectedRecord(RejectCause.OUT_OF_RANGE, f"cut {message.cut}: cuts are counted from 0")
    if isinstance(message, CutReleased):
        return
    if message.version < 0:
        raise RejectedRecord(RejectCause.NEGATIVE_VERSION, f"version {message.version}: versions start at 0")
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
            raise RejectedRecord(RejectCause.NOT_FINITE, f"group {message.group}: {name} is {number}")
        if number <= 0:
            raise RejectedRecord(RejectCause.OUT_OF_RANGE, f"group {message.group}: {name} is {number}, not above 0")
