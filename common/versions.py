"""Versions: the identity of a set of weights.

A version number counts publications; the starting model is version 0. The number orders versions, the digest identifies
the weights. Two versions have the same weights only if number and digest agree (docs/paper.md, "version").
"""

from typing import NewType

Version = NewType("Version", int)
"""Number of publications up to these weights; 0 for the starting model."""

UNTRAINABLE = -1
"""Value in per-token version arrays for tokens outside of segments (prompt, tool output, padding)."""


def staleness(now: Version, sampled: Version) -> int:
    """Return the number of versions published since the token was sampled. Measured when it is trained on.

    Raises ValueError if the token is from a later version than `now`.

    >>> staleness(Version(7), Version(5))
    2
    """
    if sampled > now:
        raise ValueError(f"a token of version {sampled} cannot be trained on at version {now}: it is in the future")
    return now - sampled
