"""Surrogate: interpolation of behavior and current log-prob by staleness (docs/algorithms/interp-prox-loglinear.md).

    proximal = behavior + a (current - behavior),    a = (d - 1) / d for staleness d >= 1, and 0 for d = 0

It needs no forward pass: each optimizer step computes it from its current log-probs. Both ratios are powers of the
total ratio.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.types import Interpolated


class Loglinear:
    """The interp_prox_loglinear source; see proximal/types.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Interpolated:
        """Return the interpolation. Raises ValueError for a token of a version after `now`."""
        shares = [current_share(batch, now).to(self._device) for batch in batches]
        behavior = [torch.from_numpy(batch.behavior).to(self._device) for batch in batches]
        return Interpolated(
            lambda place, current: loglinear(behavior[place], current, share=shares[place]),
            method="interp_prox_loglinear",
        )


def loglinear(behavior: Tensor, current: Tensor, *, share: Tensor) -> Tensor:
    """Return (1 - share) behavior + share current, without gradient; [rows, tokens], nats.

    share: weight of the current log-prob, in [0, 1). Where it is 0, the result ignores the current log-prob.
    """
    between = behavior + share.to(current.dtype) * (current.detach() - behavior)
    return torch.where(share > 0, between, behavior)


def current_share(batch: PaddedBatch, now: Version) -> Tensor:
    """Return `a` per token, [rows, tokens] float64; 0 where untrainable. Raises ValueError for versions above `now`."""
    mask, versions = torch.from_numpy(batch.mask), torch.from_numpy(batch.versions)
    staleness = torch.where(mask, now - versions, 0)
    if (staleness < 0).any():
        raise ValueError(f"a token has version {int(versions.max())}, which is after the version {now} that is trained")
    return ((staleness - 1).double() / staleness.clamp(min=1)).clamp(min=0.0)
