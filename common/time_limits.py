"""Time limits of steps that read or write all weights: they grow with the bytes."""

SLOWEST_BYTES_PER_S = 50e6
"""A step that moves weights more slowly than this is taken for one that hangs."""


def limit_s(base_s: float, size: int) -> float:
    """Return the time limit in seconds of a step over `size` bytes. base_s: for what does not depend on the size.

    >>> limit_s(120.0, 0), limit_s(120.0, 61_000_000_000)
    (120.0, 1340.0)
    """
    return base_s + size / SLOWEST_BYTES_PER_S
