"""Surrogate: the weights at the start of a version's training, for tokens of any version
(docs/algorithms/current-recompute.md).

One forward pass. Tokens of staleness 0 get their old log-prob; those of any other get the drift since then in what is
taken for the discrepancy, and the clip sees only what this version's own optimizer steps change.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.proximal.surrogates.forward_pass import score
from palimpsest.services.learner.proximal.types import Surrogate


class CurrentRecompute:
    """See proximal.py."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Surrogate:  # noqa: ARG002  the model is `now`
        """By the model as it stands."""
        return Surrogate(score(self._model, batches, self._device), method="current_recompute")
