"""What may be done about the discrepancy, and what was done. Pure.

The discrepancy of a token is r = pi_prox / mu. "Low" means that the proximal likes the token less than the sampler did.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Interval = tuple[float, float]
"""Lowest and highest ratio that is kept; both ends are kept."""
ESTIMATES = tuple(
    f"{estimator}_{level}"
    for estimator in ("k1", "k2", "k3")
    for level in ("token", "sequence_sum", "sequence_mean", "sequence_max")
)
"""Names of the divergence estimates a rule may be built on."""


class Gather(Protocol):
    """Every rank's value, on every rank, in rank order."""

    def __call__(self, value: T, /) -> list[T]:
        """All ranks call it, the same number of times."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Switches, each by itself; None: off. Bounds are of ratios, not of logarithms, where not said otherwise.

    Log-ratios of tokens, and their sum over a trajectory, are clamped to +-20: a bound beyond e^20 never binds.
    Raises ValueError for a bound that could not be meant.
    """

    weight: Literal["off", "ratio", "truncated", "clipped"] = "off"
    """Factor on a token's loss: 1, the discrepancy, at most weight_high, or inside [weight_low, weight_high]."""
    weight_level: Literal["token", "sequence"] = "token"
    """Of each token by itself, or the product over its trajectory."""
    weight_low: float = 0.5
    weight_high: float = 2.0
    weight_normalize: bool = False
    """Divide by the mean weight of the minibatch's kept tokens."""
    band: float | None = None
    """c: tokens outside [1/c, c] are masked."""
    tokens: Interval | None = None
    """Tokens outside are masked."""
    geometric: Interval | None = None
    """Trajectories whose geometric mean is outside are masked."""
    sequence: Interval | None = None
    """Trajectories whose product is outside are masked."""
    segment: Interval | None = None
    """Unbroken runs of trainable tokens whose geometric mean is outside are masked."""
    veto: float | None = None
    """Trajectories with any token below are masked."""
    difference: float | None = None
    """Tokens whose two probabilities differ by more are masked. A difference of probabilities, not a ratio."""
    estimates: Mapping[str, float] = field(default_factory=dict)
    """Name of ESTIMATES -> highest value that is kept, nats."""
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
    """Numbers of the whole minibatch over all ranks, fixed before its forward passes."""

    normalizer: float = 1.0
    """Mean weight of the kept tokens; weights are divided by it. Log it: dividing hides a shift of all ratios."""
    m2_threshold: float | None = None
    """Tokens with a larger squared log-discrepancy are masked, nats^2; infinite: none is. None: not computed."""


@dataclass(frozen=True, slots=True)
class Correction:
    """[rows, tokens] each. Meant for the loss: advantages and denominators go on counting masked tokens."""

    weight: Tensor
    """In the type of the log-probs (float32): factor on the token's loss, above 0; 0 where masked or untrainable."""
    masked: Tensor
    """bool: trainable, but removed by at least one cause."""
    causes: dict[str, Tensor] = field(default_factory=dict)
    """bool: what each cause removes by itself, whatever the others do. `missing` and `nonfinite` always, and the rules
    that are on."""

    def cpu(self) -> "Correction":
        """The same on the CPU."""
        causes = {cause: removed.cpu() for cause, removed in self.causes.items()}
        return Correction(self.weight.cpu(), self.masked.cpu(), causes)
