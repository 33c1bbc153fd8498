"""Versions: the identity of a set of weights.

A version counts publications; 0 is the start. The number orders, the digest identifies: two versions are the
same weights only if both agree (docs/paper.md, "version").
"""

from typing import NewType

Version = NewType("Version", int)
"""Publications behind the weights; 0 = the start."""

UNTRAINABLE = -1
"""Stands in per-token version arrays where no segment covers the token (prompt, tool output, padding)."""


def staleness(now: Version, sampled: Version) -> int:
    """Versions published since the token was sampled, measured when it is trained on.

    >>> staleness(Version(7), Version(5))
    2
    """
    if sampled > now:
        raise ValueError(f"a token of version {sampled} cannot be trained on at version {now}: it is in the future")
    return now - sampled
