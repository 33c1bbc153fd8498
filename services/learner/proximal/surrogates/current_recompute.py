"""Surrogate: the weights at the start of a version's training, for tokens of any version
(docs/algorithms/current-recompute.md).

The training passes of the first minibatch have these weights: its tokens need no further pass. Tokens of staleness 0
get their old log-prob. For all other tokens, the apparent discrepancy contains the drift since sampling, and the clip
sees only the change by the optimizer steps of the present version.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.proximal.surrogates.forward_pass import score
from palimpsest.services.learner.proximal.types import Surrogate


class CurrentRecompute:
    """The current_recompute source; see proximal/types.py."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Surrogate:
        """Score the micro-batches with the present weights; those of the first minibatch in their training passes."""
        masks = [on_device(batch, self._device).mask for batch in batches]
        return Surrogate(
            [torch.zeros(mask.shape, device=self._device) for mask in masks[:fresh]]
            + score(self._model, batches[fresh:], self._device),
            method="current_recompute",
            shared=[mask if place < fresh else torch.zeros_like(mask) for place, mask in enumerate(masks)],
        )
