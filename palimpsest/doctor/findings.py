"""Results of checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNS, STOPS = "ok", "warns", "stops"
GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    check: str
    value: str
    level: str = OK
    meaning: str = ""
    """Consequence of the problem; empty if the check passes."""
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """The finding as text."""
        return f"{self.check}: {self.value}. {self.meaning} {self.remedy}".strip()


def dotted(numbers: Sequence[int]) -> str:
    """Return the version as text.

    >>> dotted((3, 12, 1))
    '3.12.1'
    """
    return ".".join(str(number) for number in numbers)
