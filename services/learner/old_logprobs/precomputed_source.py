"""Old log-probs that are attached to the rows: scored by replicas, or by the learner while it held the weights
(docs/algorithms/replica.md).

The model itself scores tokens of the current version: it still holds that version's weights, because `proximal` is
called before the first optimizer step. The missing policy applies to all other tokens without a value.
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
    """A Source (proximal/types.py)."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        missing: MissingPolicy,
        why: MissingReason,
        misses: MissingCounter,
    ) -> None:
        """missing: policy for tokens without a value; why: reason that is reported for them."""
        self._model, self._device = model, device
        self._missing, self._why, self._misses = missing, why, misses

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Exact | Patched:
        """See Source. Raises UserError if a value is missing and the policy is `fail`."""
        values, holes = [], Holes()
        for batch in batches:
            value, unknown = known(batch, self._device)
            own = unknown & (batch.versions == now)
            fill(self._model, batch, own, value)
            values.append(value)
            holes.append(np.asarray(unknown & ~own))
        return apply_missing_policy(
            values, holes, batches, policy=self._missing, why=self._why, misses=self._misses,
            recompute=lambda batch, mask, value: fill(self._model, batch, mask, value),
        )  # fmt: skip
