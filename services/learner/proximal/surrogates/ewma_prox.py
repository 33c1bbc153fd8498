"""Surrogate: a moving average of the versions' weights (docs/algorithms/ewma-prox.md).

One forward pass; a float32 average and a copy of the model in its own dtype. The pass at version v uses the average
that holds version v too. It is exact for no token: one of staleness d is met by an average that is younger or older.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.surrogates.forward_pass import Shadow, score
from palimpsest.services.learner.proximal.surrogates.weight_average import Average
from palimpsest.services.learner.proximal.types import Surrogate


class EwmaProx:
    """See proximal.py, Source and Follows."""

    def __init__(
        self, model: torch.nn.Module, masters: Sequence[Tensor], device: torch.device, *, decay: float
    ) -> None:
        """masters: float32 weights of the version that the model is; decay: beta. Raises ValueError."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: an average's beta is in [0, 1)")
        self.average = Average(masters)
        self.decay = decay
        self._shadow, self._device = Shadow(model), device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Surrogate:  # noqa: ARG002  the average is of `now`
        """By the average, cast to the model's dtype."""
        model = self._shadow.with_weights(self.average.means)
        return Surrogate(score(model, batches, self._device), method="ewma_prox")

    def published(
        self,
        masters: Sequence[Tensor],
        *,
        active_share: float,  # noqa: ARG002  this average is never reset
        mean_staleness: float,  # noqa: ARG002  nor does its age follow anything
    ) -> None:
        """One tick."""
        self.average.take(masters, decay=self.decay)

    def state(self) -> dict[str, Tensor]:
        """The average's."""
        return self.average.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with that average."""
        self.average.restore(tensors)
