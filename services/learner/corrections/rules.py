"""Configuration and result of the discrepancy corrections. Pure.

The discrepancy of a token is r = pi_prox / mu. "Low" means that pi_prox gives the token less probability than mu.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Interval = tuple[float, float]
"""Lowest and highest kept ratio, inclusive."""
ESTIMATES = tuple(
    f"{estimator}_{level}"
    for estimator in ("k1", "k2", "k3")
    for level in ("token", "sequence_sum", "sequence_mean", "sequence_max")
)
"""Names of the divergence estimates that a rule can bound."""


class Gather(Protocol):
    """Returns the value of every rank, in rank order, on every rank."""

    def __call__(self, value: T, /) -> list[T]:
        """Gather the values. All ranks call it the same number of times."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Independent switches; None: off. Bounds apply to ratios, not to logarithms, unless stated otherwise.

    Log-ratios of tokens, and their sum over a trajectory, are clamped to +-20, so a bound beyond e^20 never applies.
    Raises ValueError for an invalid bound.
    """

    weight: Literal["off", "ratio", "truncated", "clipped"] = "off"
    """Factor on a token's loss: 1, the discrepancy, at most weight_high, or within [weight_low, weight_high]."""
    weight_level: Literal["token", "sequence"] = "token"
    """`token`: the ratio of the token; `sequence`: the product over its trajectory."""
    weight_low: float = 0.5
    weight_high: float = 2.0
    weight_normalize: bool = False
    """Divide by the mean weight of the minibatch: over its kept tokens, or, at the sequence level, over its kept
    trajectories."""
    band: float | None = None
    """c: mask tokens outside [1/c, c]."""
    tokens: Interval | None = None
    """Mask tokens outside."""
    geometric: Interval | None = None
    """Mask trajectories whose geometric mean is outside."""
    sequence: Interval | None = None
    """Mask trajectories whose product is outside."""
    segment: Interval | None = None
    """Mask unbroken runs of trainable tokens whose geometric mean is outside."""
    veto: float | None = None
    """Mask trajectories with at least one token below."""
    difference: float | None = None
    """Mask tokens whose two probabilities differ by more. A difference of probabilities, not a ratio."""
    estimates: Mapping[str, float] = field(default_factory=dict)
    """Name of ESTIMATES -> highest kept value, nats."""
    m2: float | None = None
    """Tokens of largest squared log-discrepancy are masked until the mean square of the rest is below, nats^2."""

    def __post_init__(self) -> None:
        for what, holds in self._demands():
            if not holds:
                raise ValueError(f"discrepancy rules: {what}")

    def _demands(self) -> Iterator[tuple[str, bool]]:
        """What must hold, as a sentence, and whether it does (never with NaN)."""
        yield f'weight = "{self.weight}" is not known', self.weight in ("off", "ratio", "truncated", "clipped")
        yield f'weight_level = "{self.weight_level}" is not known', self.weight_level in ("token", "sequence")
        if self.weight == "truncated":
            yield f"weight_high = {self.weight_high} must be above 0", self.weight_high > 0
        if self.weight == "clipped":
            interval = f"[{self.weight_low}, {self.weight_high}]"
            yield (
                f"weights inside {interval} need 0 < weight_low <= weight_high",
                (0 < self.weight_low <= self.weight_high),
            )
        yield (
            f"band = {self.band} must be above 1: tokens inside [1/band, band] are kept",
            (self.band is None or self.band > 1),
        )
        for name in ("tokens", "geometric", "sequence", "segment"):
            interval = getattr(self, name)
            yield f"{name} = {interval} needs 0 <= low < high", interval is None or 0 <= interval[0] < interval[1]
        for name in ("veto", "difference", "m2"):
            bound = getattr(self, name)
            yield f"{name} = {bound} must be above 0", bound is None or bound > 0
        for name, bound in self.estimates.items():
            yield f"there is no estimate {name}, only {', '.join(ESTIMATES)}", name in ESTIMATES
            yield f"estimates.{name} = {bound} must be a number", not math.isnan(bound)


@dataclass(frozen=True, slots=True)
class Limits:
    """Values of the minibatch over all ranks, computed before its forward passes."""

    normalizer: float = 1.0
    """Mean weight; all weights are divided by it. Report it: the division hides a common shift of all ratios."""
    m2_threshold: float | None = None
    """Tokens with a larger squared log-discrepancy are masked, nats^2; infinite: none is. None: not computed."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Result of the rules, [rows, tokens] each. It applies to the loss only: advantages and denominators ignore it."""

    weight: Tensor
    """Factor on the token's loss, above 0, in the dtype of the log-probs; 0 where masked or untrainable."""
    masked: Tensor
    """bool: trainable and removed by at least one cause."""
    causes: dict[str, Tensor] = field(default_factory=dict)
    """bool: tokens that each cause removes, independent of other causes. Keys: `missing`, `nonfinite` and the enabled
    rules."""

    def cpu(self) -> "Correction":
        """Return a copy on the CPU."""
        causes = {cause: removed.cpu() for cause, removed in self.causes.items()}
        return Correction(self.weight.cpu(), self.masked.cpu(), causes)
