"""Old log-probs that are attached to the rows: scored by replicas, or by the learner while it held the weights
(docs/algorithms/replica.md).

The model itself scores tokens of the current version: it still holds that version's weights, because `proximal` is
called before the first optimizer step. In the first minibatch the training passes score them. The missing policy
applies to all other tokens without a value.
"""

from collections.abc import Sequence

import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason, complete
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.proximal.types import Exact, Patched


class PrecomputedSource:
    """A Source (proximal/types.py)."""

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        max_tokens: int,
        missing: MissingPolicy,
        why: MissingReason,
        misses: MissingCounter,
        ranks: ProcessGroup | None = None,
    ) -> None:
        """max_tokens: of a pass, padding included; missing: policy for tokens without a value; why: reason that is
        reported for them; ranks: None if this process is alone."""
        self._model, self._ranks, self._device, self._max_tokens = model, ranks, device, max_tokens
        self._missing, self._why, self._misses = missing, why, misses

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact | Patched:
        """See Source. Raises UserError if a value is missing and the policy is `fail`."""
        scores = BatchScores(batches, self._device, max_tokens=self._max_tokens, fresh=fresh, ranks=self._ranks)
        return complete(scores, batches, now, self._model, policy=self._missing, why=self._why, misses=self._misses)
