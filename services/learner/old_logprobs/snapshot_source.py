"""Exact old log-probs from the snapshot store (docs/algorithms/snapshot.md).

A shadow copy of the model takes on one version after another and scores the rows that hold tokens of that version;
each token keeps the value of its own version. Tokens of the current version need no copy: the model itself still is
that version, because this happens before the first optimizer step. What was scored before is not scored again. Cost:
one bf16 copy, and one pass over a row for each version in it.
"""

import copy
from collections.abc import Callable, Sequence

import torch

from palimpsest.common.config.proximal import MissingPolicy
from palimpsest.common.snapshots.client import SnapshotClient, VersionMissing
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import PaddedBatch, versions_present
from palimpsest.services.learner.old_logprobs.missing import MissingCounter, MissingReason, apply_missing_policy
from palimpsest.services.learner.old_logprobs.scoring import fill, known
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.proximal.types import Exact, Patched


class SnapshotSource:
    """See proximal.py."""

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
        self._model, self._store, self._device = model, store, device
        self._shadow: VersionedModel | None = None
        self._loaded = loaded
        self._missing: MissingPolicy = missing
        self._misses = misses or MissingCounter()

    def proximal(self, batches: Sequence[PaddedBatch], now: Version) -> Exact | Patched:
        """Scored version by version, the shadow's present one first. Raises UserError."""
        values, unknown = [], []
        for batch in batches:
            value, left = known(batch, self._device)
            values.append(value)
            unknown.append(left)
        present = versions_present([row for batch in batches for row in batch.rows])
        held = self._shadow.version if self._shadow else None
        for version in sorted(present, key=lambda v: (v != held, v)):
            wanted = [left & (batch.versions == version) for left, batch in zip(unknown, batches, strict=True)]
            if not any(own.any() for own in wanted):
                continue
            try:
                model = self._model if version == now else self._model_at(version)
            except VersionMissing:
                continue
            for batch, own, value, left in zip(batches, wanted, values, unknown, strict=True):
                fill(model, batch, own, value)
                left &= ~own
        return apply_missing_policy(
            values, unknown, batches, policy=self._missing, why=MissingReason.VERSION_GONE, misses=self._misses,
            recompute=lambda batch, wanted, value: fill(self._model, batch, wanted, value),
        )  # fmt: skip

    def _model_at(self, version: Version) -> torch.nn.Module:
        """The shadow with this version's weights. Raises VersionMissing, UserError."""
        if self._shadow is None:
            self._shadow = VersionedModel(copy.deepcopy(self._model).requires_grad_(False), self._store)
        if self._shadow.load_version(version):
            self._loaded(version)
        return self._shadow.model
