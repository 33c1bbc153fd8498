"""Requirements of the pinned sets. docs/installation.md has the same table."""

from __future__ import annotations

import datetime

PYTHONS = ((3, 11), (3, 12), (3, 13))
MACHINES = ("x86_64", "aarch64")
"""Architectures with wheels of every pinned package."""
GLIBC = {"cpu": {"x86_64": (2, 28), "aarch64": (2, 28)}, "gpu": {"x86_64": (2, 28), "aarch64": (2, 34)}}
"""Minimum version of glibc for the wheels, by pinned set and architecture."""
CUDA, DRIVER = "13.0", 580
"""CUDA version of the pinned torch, and the oldest driver branch that supports it."""
INSTALLED_GB = {"cpu": 6.6, "gpu": 11.0}
NEEDED_GB = {"cpu": 9.0, "gpu": 14.0}
"""Disk that an installation and its downloads need."""
RELEASED = datetime.date(2026, 11, 1)
"""Date of this release. A clock with an earlier date is wrong."""


def pythons() -> str:
    """Return the supported versions of Python as text.

    >>> pythons()
    '3.11, 3.12 or 3.13'
    """
    *first, last = [f"{major}.{minor}" for major, minor in PYTHONS]
    return f"{', '.join(first)} or {last}"
