"""Surrogate: between the behavior and the current log-prob, by staleness (docs/algorithms/interp-prox-loglinear.md).

    proximal = behavior + a (current - behavior),    a = (d - 1) / d for staleness d >= 1, and 0 for d = 0

No forward pass: it is made anew from each optimizer step's own log-probs. Both ratios are powers of the total ratio.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.types import Interpolated


class Loglinear:
    """See proximal.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Interpolated:
        """Raises ValueError for a token of a version after `now`."""
        shares = [current_share(batch, now).to(self._device) for batch in batches]
        behavior = [torch.from_numpy(batch.behavior).to(self._device) for batch in batches]
        return Interpolated(
            lambda place, current: loglinear(behavior[place], current, share=shares[place]),
            method="interp_prox_loglinear",
        )


def loglinear(behavior: Tensor, current: Tensor, *, share: Tensor) -> Tensor:
    """(1 - share) behavior + share current, without gradient; [rows, tokens], nats.

    share: of the current log-prob, in [0, 1). Where it is 0 the current one does not matter, finite or not.
    """
    between = behavior + share.to(current.dtype) * (current.detach() - behavior)
    return torch.where(share > 0, between, behavior)


def current_share(batch: PaddedBatch, now: Version) -> Tensor:
    """a of each token, [rows, tokens] float64; 0 where untrainable. Raises ValueError for versions above `now`."""
    mask, versions = torch.from_numpy(batch.mask), torch.from_numpy(batch.versions)
    staleness = torch.where(mask, now - versions, 0)
    if (staleness < 0).any():
        raise ValueError(
            f"a token of version {int(versions.max())} cannot be trained on at version {now}: it is in the future"
        )
    return ((staleness - 1).double() / staleness.clamp(min=1)).clamp(min=0.0)
