"""Names of a run's two factors. Pure.

The factors are the discrepancy and the staleness ratio only if the proximal log-probs are the old ones. With a
surrogate they are called correction and update, and the surrogate is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Names:
    """Names and symbols of the two factors."""

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
    """Return the names of a run's factors: SURROGATE if any version used a surrogate."""
    return EXACT if all(line["exact"] for line in lines) else SURROGATE


def method(line: Line) -> str:
    """Return the source of the proximal log-probs: "exact", or a surrogate's name.

    >>> method({"exact": False, "proximal": "ewma_prox"}), method({"exact": False}), method({"exact": True})
    ('ewma_prox', 'unknown', 'exact')
    """
    return str(line.get("proximal", "exact" if line["exact"] else UNKNOWN))


def methods(lines: Sequence[Line]) -> dict[str, int]:
    """Return method -> number of versions, in the order of first use."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[method(line)] = counts.get(method(line), 0) + 1
    return counts


def coverage(line: Line) -> float | None:
    """Return the share of the tokens whose proximal log-prob is the old one; None if the line has no count."""
    share: float | None = line.get("old", {}).get("coverage")
    return share


def in_words(line: Line) -> str:
    """Describe the proximal policy of a version.

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
