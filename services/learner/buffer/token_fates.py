"""Tokens that were trained on, and tokens that were lost because they exceeded the staleness bound. Pure.

Counted by the length and by the duration of their trajectory, because a rule that favors short or fast trajectories
biases what is learned.
"""

import math

LENGTH, DURATION = "length", "seconds"
SHORTEST_S = 2.0**-4
"""Durations below share a bin."""
Fates = dict[str, dict[str, list[int]]]
"""LENGTH or DURATION -> lower edge of the bin, a power of 2 -> tokens [trained, lost]."""


class TokenFates:
    """The counts since the last call of `take`.

    >>> fates = TokenFates()
    >>> fates.add(sampled=100, trained=40, seconds=9.0)
    >>> fates.add(sampled=70, trained=70, seconds=0.7)
    >>> fates.take()
    {'length': {'64': [110, 60]}, 'seconds': {'8': [40, 60], '0.5': [70, 0]}}
    """

    def __init__(self) -> None:
        self._fates: Fates = {LENGTH: {}, DURATION: {}}

    def add(self, *, sampled: int, trained: int, seconds: float) -> None:
        """Count a trajectory. sampled: its trainable tokens; seconds: from the offer until it arrived."""
        if not sampled:
            return
        for what, value in ((LENGTH, float(sampled)), (DURATION, max(seconds, SHORTEST_S))):
            counts = self._fates[what].setdefault(f"{2.0 ** math.floor(math.log2(value)):g}", [0, 0])
            counts[0] += trained
            counts[1] += sampled - trained

    def take(self) -> Fates:
        """Return the counts and start again at 0."""
        fates, self._fates = self._fates, {LENGTH: {}, DURATION: {}}
        return fates
