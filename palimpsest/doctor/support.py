"""What the pinned sets need of a machine. docs/installation.md says the same in a table."""

from __future__ import annotations

import datetime

PYTHONS = ((3, 11), (3, 12), (3, 13))
MACHINES = ("x86_64", "aarch64")
"""Architectures for which every pinned wheel exists."""
GLIBC = {"cpu": {"x86_64": (2, 28), "aarch64": (2, 28)}, "gpu": {"x86_64": (2, 28), "aarch64": (2, 34)}}
"""The oldest C library that the wheels of a kind of machine run on."""
CUDA, DRIVER = "13.0", 580
"""The CUDA of the pinned torch, and the oldest driver branch that runs it."""
INSTALLED_GB = {"cpu": 6.6, "gpu": 11.0}
NEEDED_GB = {"cpu": 9.0, "gpu": 14.0}
"""Disk that an installation needs, downloads included."""
RELEASED = datetime.date(2026, 11, 1)
"""A clock before this day is wrong."""


def pythons() -> str:
    """The supported versions of Python, for a sentence.

    >>> pythons()
    '3.11, 3.12 or 3.13'
    """
    *first, last = [f"{major}.{minor}" for major, minor in PYTHONS]
    return f"{', '.join(first)} or {last}"
