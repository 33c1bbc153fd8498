"""What stands in the clip anchor's place, and what it is.

`old` names an identity: the training-side policy with the weights that sampled the token. `proximal` names a role in
the loss. The type says which of the two one holds; there is no third way of having a number there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.versions import Version
from services.learner.batching import Padded


@dataclass(frozen=True, slots=True)
class Exact:
    """Old log-probs, every token under its own version."""

    logprobs: list[Tensor]
    """For each micro-batch [rows, tokens] float32, nats; 0 where untrainable."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """Another policy's log-probs in the proximal's place."""

    logprobs: list[Tensor]
    method: str


Proximal = Exact | Surrogate


class Source(Protocol):
    """Gives the proximal log-probs of a batch before its first optimizer step."""

    def proximal(self, batches: Sequence[Padded], now: Version) -> Proximal:
        """For these micro-batches, at this version. Raises Refusal when a version it needs is not to be had."""
