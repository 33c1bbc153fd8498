"""Types of the proximal policy (the clip anchor).

`old` names an identity: the training-side policy with the weights that sampled the token. `proximal` names a role in
the loss. The type tells whether the values are exact. A token without a value is missing and never gets the value of
another policy silently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, Routes


@dataclass(frozen=True, slots=True)
class ProximalValues:
    """Proximal log-probs of one micro-batch; [rows, tokens] each."""

    logprobs: Tensor
    """float32, nats; 0 where untrainable or missing."""
    missing: Tensor
    """bool: trainable, without a value. The loss leaves out such a token, and a counter counts it."""
    exact: Tensor
    """bool: tokens whose value is the old log-prob."""


Masks = list[Tensor]
"""For each micro-batch [rows, tokens] bool."""
Passes = list[NDArray[np.int32]]
"""For each micro-batch [rows, tokens]: number of the pass that scored the token, or NO_PASS, or TRAINING_PASS."""
NO_PASS = -1
"""The token is untrainable, its value came with the row, or it has none."""
TRAINING_PASS = -2
"""The forward pass of the training gives the value: its weights are those of the version trained at."""


RecordedRoutes = list[Routes | None]
"""For each micro-batch the experts of the passes that scored it; None: no pass scored it, or nothing was recorded."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Old log-probs: each token scored with the version that sampled it."""

    logprobs: list[Tensor]
    """For each micro-batch [rows, tokens] float32, nats; 0 where untrainable."""
    absent: Masks | None = None
    """Tokens without an old log-prob. None: every token has one."""
    shared: Masks | None = None
    """Tokens whose value is the current log-prob of the training pass. None: no token."""
    passes: Passes | None = None
    """The layout of the scoring. None: unknown."""
    routes: RecordedRoutes | None = None
    """None: nothing was recorded."""

    method: str = "exact"

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """Return the values of a micro-batch. current: detached current log-probs; mask: trainable tokens."""
        missing = torch.zeros_like(mask) if self.absent is None else self.absent[place]
        return ProximalValues(_values(self, place, current), missing, mask & ~missing)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Log-probs of another policy as the proximal."""

    logprobs: list[Tensor]
    method: str
    shared: Masks | None = None
    """See Exact."""

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        none = torch.zeros_like(mask)
        return ProximalValues(_values(self, place, current), none, none)


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A surrogate computed from behavior and current log-probs in each forward pass."""

    interpolate: Callable[[int, Tensor], Tensor]
    """Number of the micro-batch, current log-probs without gradient [rows, tokens] -> proximal log-probs."""
    method: str
    """Name of the surrogate."""

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        none = torch.zeros_like(mask)
        return ProximalValues(self.interpolate(place, current), none, none)


@dataclass(frozen=True, slots=True)
class Patched:
    """Old log-probs where present, and those of a surrogate elsewhere (missing = "surrogate:NAME")."""

    logprobs: list[Tensor]
    patched: Masks
    """Tokens with the value of the surrogate."""
    method: str
    """Name of the surrogate."""
    shared: Masks | None = None
    """See Exact."""
    passes: Passes | None = None
    """See Exact."""
    routes: RecordedRoutes | None = None
    """See Exact."""

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        return ProximalValues(_values(self, place, current), torch.zeros_like(mask), mask & ~self.patched[place])


Proximal = Exact | Surrogate | Interpolated | Patched


def _values(proximal: Exact | Surrogate | Patched, place: int, current: Tensor) -> Tensor:
    """The values of a micro-batch, with the current log-probs where they are shared."""
    own = proximal.logprobs[place]
    return own if proximal.shared is None else torch.where(proximal.shared[place], current.detach().to(own.dtype), own)


def layout(proximal: Proximal, place: int) -> NDArray[np.int32] | None:
    """Return the passes that scored a micro-batch, [rows, tokens]; None if they are unknown."""
    passes = proximal.passes if isinstance(proximal, Exact | Patched) else None
    return None if passes is None else passes[place]


def replay_routes(batches: list[PaddedBatch], proximal: Proximal) -> None:
    """Give each micro-batch the routes that were recorded with its old log-probs."""
    recorded = proximal.routes if isinstance(proximal, Exact | Patched) else None
    for place, routes in enumerate(recorded or ()):
        if routes is not None:
            batches[place] = replace(batches[place], routes=routes)


class Source(Protocol):
    """Computes the proximal log-probs of a batch before its first optimizer step."""

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Proximal:
        """Return the proximal of these micro-batches at version `now`. Raises UserError if a version is missing.

        fresh: number of leading micro-batches whose training passes have the weights of `now`, because no optimizer
        step comes before them. The source may leave their tokens of `now` to these passes (`shared`).
        """


@runtime_checkable
class StatefulSource(Protocol):
    """A source with a state that each version updates."""

    def published(
        self,
        masters: Sequence[Tensor],
        *,
        active_share: float,
        mean_staleness: float,
        unmasked_share: float = math.nan,
        version: Version | None = None,
    ) -> None:
        """Update the state after a version was trained. All ranks pass the same values.

        masters: float32 weights; active_share: share of all trainable tokens, over all ranks, that are neither masked
        nor clipped; mean_staleness: of the trained tokens, in versions; unmasked_share: share that is not masked,
        clipped or not; version: the version with these weights, not yet in the store.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, by name."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from a checkpoint. Raises ValueError if it is of another model."""
