"""What stands in the clip anchor's place, and what it is.

`old` names an identity: the training-side policy with the weights that sampled the token. `proximal` names a role in
the loss. The type says which of the two one holds; there is no third way of having a number there, and a token without
one is missing, never given another's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch


@dataclass(frozen=True, slots=True)
class ProximalValues:
    """Of one micro-batch; [rows, tokens] each."""

    logprobs: Tensor
    """float32, nats; 0 where untrainable or missing."""
    missing: Tensor
    """bool: trainable, but there is no value. Such a token is left out of the loss and counted."""
    exact: Tensor
    """bool: the value is the old log-prob."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Old log-probs, every token under its own version."""

    logprobs: list[Tensor]
    """For each micro-batch [rows, tokens] float32, nats; 0 where untrainable."""
    absent: list[Tensor] | None = None
    """For each micro-batch [rows, tokens] bool: the old log-prob is not to be had. None: nowhere."""

    method: str = "exact"

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """Of the micro-batch at this place. current: detached log-probs of the live policy; mask: trainable tokens."""
        missing = torch.zeros_like(mask) if self.absent is None else self.absent[place]
        return ProximalValues(self.logprobs[place], missing, mask & ~missing)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Another policy's log-probs in the proximal's place."""

    logprobs: list[Tensor]
    method: str

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        no = torch.zeros_like(mask)
        return ProximalValues(self.logprobs[place], no, no)


@dataclass(frozen=True, slots=True)
class Interpolated:
    """A surrogate made of behavior and current log-probs, so made anew at each forward pass."""

    interpolate: Callable[[int, Tensor], Tensor]
    """Place of the micro-batch, current log-probs without gradient [rows, tokens] -> proximal log-probs."""
    method: str

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        no = torch.zeros_like(mask)
        return ProximalValues(self.interpolate(place, current), no, no)


@dataclass(frozen=True, slots=True)
class Patched:
    """Old log-probs where there are any, a surrogate's for the others (missing = "surrogate:NAME")."""

    logprobs: list[Tensor]
    patched: list[Tensor]
    """bool: the surrogate's."""
    method: str
    """The surrogate."""

    def anchor(self, place: int, current: Tensor, mask: Tensor) -> ProximalValues:
        """See Exact."""
        return ProximalValues(self.logprobs[place], torch.zeros_like(mask), mask & ~self.patched[place])


Proximal = Exact | Surrogate | Interpolated | Patched


class Source(Protocol):
    """Gives the proximal log-probs of a batch before its first optimizer step."""

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Proximal:
        """For these micro-batches, at this version. Raises UserError when a version it needs is not to be had."""


@runtime_checkable
class StatefulSource(Protocol):
    """A source with a state of its own that goes along with the versions."""

    def published(self, masters: Sequence[Tensor], *, active_share: float, mean_staleness: float) -> None:
        """A version was trained. masters: float32 weights; active_share: of all trainable tokens, over all ranks, those
        neither masked nor clipped; mean_staleness: of the trained tokens. Every rank is told the same."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises ValueError when it is another model's."""
