"""Surrogate: a mixture of the behavior and the current probability (docs/algorithms/linear-prox.md).

    proximal = log(alpha exp(behavior) + (1 - alpha) exp(current))

alpha does not depend on the staleness. It needs no forward pass: each optimizer step computes it from its current
log-probs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.types import Interpolated


class LinearProx:
    """The linear_prox source; see proximal/types.py."""

    def __init__(self, device: torch.device, *, behavior_share: float) -> None:
        """behavior_share: alpha, in [0, 1]. Raises ValueError outside."""
        if not 0 <= behavior_share <= 1:
            raise ValueError(f"behavior_share is {behavior_share}; it must be in [0, 1]")
        self._device, self._share = device, behavior_share

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Interpolated:
        """Return the mixture, computed in each forward pass."""
        behavior = [torch.from_numpy(batch.behavior).to(self._device) for batch in batches]
        masks = [torch.from_numpy(batch.mask).to(self._device) for batch in batches]
        return Interpolated(
            lambda place, current: torch.where(
                masks[place],
                linear(behavior[place], current, behavior_share=self._share),
                torch.zeros((), device=self._device, dtype=current.dtype),
            ),
            method="linear_prox",
        )


def linear(behavior: Tensor, current: Tensor, *, behavior_share: float) -> Tensor:
    """Return log(alpha e^behavior + (1 - alpha) e^current), without gradient; [rows, tokens], nats.

    alpha = 1 gives `behavior` and alpha = 0 gives `current`, bit for bit.
    """
    now = current.detach()
    return torch.logaddexp(_log(behavior_share) + behavior.to(now.dtype), _log(1 - behavior_share) + now)


def _log(share: float) -> float:
    return math.log(share) if share else -math.inf
