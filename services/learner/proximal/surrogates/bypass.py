"""Surrogate: the behavior log-probs (docs/algorithms/bypass.md).

The discrepancy is then 1, and the clip acts on the total ratio. It needs no forward pass and no memory.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.types import Surrogate


class Bypass:
    """The bypass source; see proximal/types.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Surrogate:
        """Return the behavior log-probs; 0 where untrainable."""
        return Surrogate([torch.from_numpy(batch.behavior).to(self._device) for batch in batches], method="bypass")
