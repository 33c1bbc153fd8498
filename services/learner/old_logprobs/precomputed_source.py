"""Old log-probs that came with the rows: scored by replicas, or by the learner itself while it held the weights
(docs/algorithms/replica.md).

Tokens of the present version need nobody: the model itself still is that version, because this happens before the first
optimizer step. What neither has is left to the missing policy.
"""

from collections.abc import Sequence

import numpy as np
import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.old_logprobs.missing import Holes, MissingCounter, MissingReason, apply_missing_policy
from palimpsest.services.learner.old_logprobs.scoring import fill, known
from palimpsest.services.learner.proximal.types import Exact, Patched


class PrecomputedSource:
    """See proximal.py."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        missing: MissingPolicy,
        why: MissingReason,
        misses: MissingCounter,
    ) -> None:
        """why: what it means here that an old log-prob is not there."""
        self._model, self._device = model, device
        self._missing, self._why, self._misses = missing, why, misses

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Exact | Patched:
        """What is known, what the model itself gives, and the policy for the others."""
        values, holes = [], Holes()
        for batch in batches:
            value, unknown = known(batch, self._device)
            own = unknown & (batch.versions == now)
            fill(self._model, batch, own, value)
            values.append(value)
            holes.append(np.asarray(unknown & ~own))
        return apply_missing_policy(
            values, holes, batches, policy=self._missing, why=self._why, misses=self._misses,
            recompute=lambda batch, wanted, value: fill(self._model, batch, wanted, value),
        )  # fmt: skip
