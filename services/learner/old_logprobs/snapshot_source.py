"""Exact old log-probs from the snapshot store (docs/algorithms/snapshot.md).

A copy of the model (the shadow) moves in place from version to version, along the deltas of the store, and scores the
rows with tokens of that version. Each token gets the value of the version that sampled it. Tokens of the current
version need no copy: the model itself still holds that version's weights, because `proximal` is called before the first
optimizer step. In the first minibatch they need no pass either: the training passes score them. Tokens with a value are
not scored again. Cost: one bf16 copy of the model, and for each older version in a row one pass over the row up to that
version's last token (passes.py).
"""

from collections.abc import Callable, Sequence

import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.chain import order
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, versions_present
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import copy_trained
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason, complete
from palimpsest.services.learner.old_logprobs.passes import BatchScores
from palimpsest.services.learner.old_logprobs.versioned_model import MovableModel, VersionedModel
from palimpsest.services.learner.proximal.types import Exact, Patched


class SnapshotSource:
    """A Source (proximal/types.py)."""

    def __init__(
        self,
        model: torch.nn.Module,
        store: VersionSource,
        device: torch.device,
        *,
        max_tokens: int,
        loaded: Callable[[Version], None],
        missing: MissingPolicy = "fail",
        misses: MissingCounter | None = None,
        ranks: ProcessGroup | None = None,
        shadow: Callable[[], MovableModel] | None = None,
        adapter: Adapter | None = None,
        record_routes: bool = False,
    ) -> None:
        """max_tokens: of a pass, padding included; loaded: called with each version that is loaded from the store;
        missing: policy for versions that the store does not hold; ranks: None if this process is alone;
        shadow: builds the shadow at its first use, None: a copy of the model; adapter: of the model's versions;
        record_routes: whether to return the experts of the passes."""
        self._model, self._store, self._device, self._max_tokens = model, store, device, max_tokens
        self._ranks, self._record_routes = ranks, record_routes
        self._shadow: MovableModel | None = None
        self._build = shadow or self._copy
        self._loaded, self._adapter = loaded, adapter
        self._missing: MissingPolicy = missing
        self._misses = misses or MissingCounter()

    def proximal(self, batches: Sequence[PaddedBatch], now: Version, fresh: int = 0) -> Exact | Patched:
        """See Source. Scores version by version, in the order that moves the shadow least.

        Raises UserError if a snapshot is damaged, or if a version is missing and the policy is `fail`.
        """
        scores = BatchScores(
            batches,
            self._device,
            max_tokens=self._max_tokens,
            fresh=fresh,
            ranks=self._ranks,
            record_routes=self._record_routes,
        )
        held = self._shadow.version if self._shadow else None
        present = versions_present([row for batch in batches for row in batch.rows])
        older = [version for version in present if version != now and any(own.any() for own in scores.of(version))]
        if self._ranks is not None and self._ranks.equal_passes:
            older = sorted({version for part in self._ranks.all_gather_object(older) for version in part})
        for version in order(held, older):
            try:
                model = self._model_at(version)
            except VersionMissing:
                continue
            scores.score(model, scores.of(version))
        return complete(
            scores, batches, now, self._model,
            policy=self._missing, why=MissingReason.VERSION_GONE, misses=self._misses,
        )  # fmt: skip

    def expect(self, version: Version) -> None:
        """Prepare for tokens of this version, the newest that the next batch may need a copy for."""
        if self._shadow is not None:
            self._shadow.expect(version)

    def _model_at(self, version: Version) -> torch.nn.Module:
        """Return the shadow with this version's weights.

        Raises VersionMissing if the store does not hold it, UserError if it is damaged.
        """
        if self._shadow is None:
            self._shadow = self._build()
        if self._shadow.load_version(version):
            self._loaded(version)
        return self._shadow.model

    def _copy(self) -> VersionedModel:
        return VersionedModel(copy_trained(self._model).requires_grad_(False), self._store, self._adapter)
