"""Surrogate: a moving average of the versions' weights (docs/algorithms/ewma-prox.md).

It needs one forward pass, a float32 average, and a copy of the model in its own dtype. The pass at version v uses the
average that includes version v. It is not exact for any token: the age of the average differs from the staleness.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.surrogates.forward_pass import Shadow, SplitPolicy, score
from palimpsest.services.learner.proximal.surrogates.weight_average import Average
from palimpsest.services.learner.proximal.types import Surrogate


class EwmaProx:
    """The ewma_prox source; see Source and StatefulSource in proximal/types.py."""

    def __init__(
        self,
        model: torch.nn.Module,
        masters: Sequence[Tensor],
        device: torch.device,
        *,
        decay: float,
        split: SplitPolicy | None = None,
    ) -> None:
        """masters: float32 weights of the model's version; decay: beta; split: of a sharded policy. Raises ValueError
        for beta outside [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1)")
        self.average = Average(masters, gather=None if split is None else split.gather)
        self.decay = decay
        self._shadow, self._device = Shadow(model, split), device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Surrogate:
        """Score the micro-batches with the average, cast to the dtype of the model."""
        model = self._shadow.with_weights(self.average.means)
        return Surrogate(score(model, batches, self._device), method="ewma_prox")

    def published(
        self,
        masters: Sequence[Tensor],
        *,
        active_share: float,
        mean_staleness: float,
        unmasked_share: float = math.nan,
        version: Version | None = None,
    ) -> None:
        """Add the version to the average."""
        self.average.take(masters, decay=self.decay)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the average."""
        return self.average.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the average."""
        self.average.restore(tensors)
