"""What a check finds, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNS, STOPS = "ok", "warns", "stops"
GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str
    value: str
    level: str = OK
    meaning: str = ""
    """What follows from it; empty where all is well."""
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """The finding for a person."""
        return f"{self.check}: {self.value}. {self.meaning} {self.remedy}".strip()


def dotted(numbers: Sequence[int]) -> str:
    """A version as people write it.

    >>> dotted((3, 12, 1))
    '3.12.1'
    """
    return ".".join(str(number) for number in numbers)
