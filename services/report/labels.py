"""What a run's two factors may be called. Pure.

Only with old log-probs in the proximal's place is one factor the engine's discrepancy and the other the staleness
ratio. With a surrogate they are a correction and an update, and the surrogate has a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Names:
    """Of the factors."""

    discrepancy: str
    ratio: str
    discrepancy_symbol: str
    ratio_symbol: str


EXACT = Names(
    "discrepancy", "staleness ratio", "|log π<sub>v</sub> / μ<sub>v</sub>|", "|log π<sub>θ</sub> / π<sub>v</sub>|"
)
SURROGATE = Names(
    "correction", "update", "|log π<sub>prox</sub> / μ<sub>v</sub>|", "|log π<sub>θ</sub> / π<sub>prox</sub>|"
)


def names(lines: Sequence[Line]) -> Names:
    """Of a run's factors: one version with a surrogate is enough to lose the names."""
    return EXACT if all(line["exact"] for line in lines) else SURROGATE


def method(line: Line) -> str:
    """What stood in the proximal's place: "exact", or a surrogate's name.

    >>> method({"exact": False, "proximal": "ewma_prox"}), method({"exact": False}), method({"exact": True})
    ('ewma_prox', 'unknown', 'exact')
    """
    return str(line.get("proximal", "exact" if line["exact"] else UNKNOWN))


def methods(lines: Sequence[Line]) -> dict[str, int]:
    """The same over a run -> versions, in the order of their first use."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[method(line)] = counts.get(method(line), 0) + 1
    return counts


def coverage(line: Line) -> float | None:
    """Share of the tokens that had their old log-prob in the proximal's place; None where nobody counted."""
    told: float | None = line.get("old", {}).get("coverage")
    return told


def in_words(line: Line) -> str:
    """Of the proximal of a version.

    >>> in_words({"exact": False, "proximal": "bypass", "old": {"coverage": 0.98}})
    'bypass for 2.0 % of the tokens, for the others exact'
    >>> in_words({"exact": False, "proximal": "bypass", "old": {"coverage": 0.0}})
    'bypass, a surrogate'
    """
    if line["exact"]:
        return "exact"
    if share := coverage(line):
        return f"{method(line)} for {100 * (1 - share):.1f} % of the tokens, for the others exact"
    return f"{method(line)}, a surrogate"
