"""Exact old log-probs from the snapshot store (docs/algorithms/snapshot.md).

A copy of the model (the shadow) moves in place from version to version, along the deltas of the store, and scores the
rows with tokens of that version. Each token gets the value of the version that sampled it. Tokens of the current
version need no copy: the model itself still holds that version's weights, because `proximal` is called before the first
optimizer step. Tokens with a value are not scored again. Cost: one bf16 copy of the model, and one pass over a row for
each version in it.
"""

import copy
from collections.abc import Callable, Sequence

import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.snapshots.chain import order
from palimpsest.common.snapshots.client import SnapshotClient, VersionMissing
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, versions_present
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason, apply_missing_policy
from palimpsest.services.learner.old_logprobs.scoring import fill, known
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.proximal.types import Exact, Patched


class SnapshotSource:
    """A Source (proximal/types.py)."""

    def __init__(
        self,
        model: torch.nn.Module,
        store: SnapshotClient,
        device: torch.device,
        *,
        loaded: Callable[[Version], None],
        missing: MissingPolicy = "fail",
        misses: MissingCounter | None = None,
    ) -> None:
        """loaded: called with each version that is loaded from the store; missing: policy for versions that the store
        does not hold."""
        self._model, self._store, self._device = model, store, device
        self._shadow: VersionedModel | None = None
        self._loaded = loaded
        self._missing: MissingPolicy = missing
        self._misses = misses or MissingCounter()

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Exact | Patched:
        """See Source. Scores version by version, in the order that moves the shadow least.

        Raises UserError if a snapshot is damaged, or if a version is missing and the policy is `fail`.
        """
        values, unknown = [], []
        for batch in batches:
            value, holes = known(batch, self._device)
            values.append(value)
            unknown.append(holes)
        present = versions_present([row for batch in batches for row in batch.rows])
        held = self._shadow.version if self._shadow else None
        for version in [*order(held, {*present} - {now}), now]:
            masks = [holes & (batch.versions == version) for holes, batch in zip(unknown, batches, strict=True)]
            if not any(mask.any() for mask in masks):
                continue
            try:
                model = self._model if version == now else self._model_at(version)
            except VersionMissing:
                continue
            for batch, mask, value, holes in zip(batches, masks, values, unknown, strict=True):
                fill(model, batch, mask, value)
                holes &= ~mask
        return apply_missing_policy(
            values, unknown, batches, policy=self._missing, why=MissingReason.VERSION_GONE, misses=self._misses,
            recompute=lambda batch, mask, value: fill(self._model, batch, mask, value),
        )  # fmt: skip

    def _model_at(self, version: Version) -> torch.nn.Module:
        """Return the shadow with this version's weights.

        Raises VersionMissing if the store does not hold it, UserError if it is damaged.
        """
        if self._shadow is None:
            self._shadow = VersionedModel(copy.deepcopy(self._model).requires_grad_(False), self._store)
        if self._shadow.load_version(version):
            self._loaded(version)
        return self._shadow.model
