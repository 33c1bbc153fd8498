"""The weights of the policy on their way to the store."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ParentMissing, ParentWeights, RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Canary, Manifest, Parent
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import named_weights, raw_tensors


class VersionWeights(Protocol):
    """Copies the weights, and stores the copy as a version."""

    def copy(self) -> None:
        """Copy the present weights to host memory. Only the loop's thread may call it."""

    def store(self, version: Version, canaries: Sequence[Canary], *, writer: int) -> Manifest:
        """Store the copy: as a delta to the version stored before if that costs less. It is then no longer needed.

        writer: epoch of this learner. Raises Fenced if another learner has the run.
        """


class WholeWeights:
    """See VersionWeights. This process holds all weights."""

    def __init__(
        self, store: SnapshotClient, model: torch.nn.Module, *, run: str, adapter: Adapter | None = None
    ) -> None:
        """adapter: what the published weights of the model are; None: whole weights."""
        self._store, self._model, self._run, self._adapter = store, model, run, adapter
        self._copy: list[RawTensor] = []
        self._parent: ParentWeights | None = None
        """The version stored last, with a copy of its weights; None at the start: the first version has no parent."""

    def copy(self) -> None:
        """See VersionWeights."""
        self._copy = [replace(tensor, raw=tensor.raw.copy()) for tensor in raw_tensors(named_weights(self._model))]

    def store(self, version: Version, canaries: Sequence[Canary], *, writer: int) -> Manifest:
        """See VersionWeights."""
        weights, parent = self._copy, self._parent
        put = partial(self._store.put, self._run, version, weights, canaries, adapter=self._adapter)
        try:
            manifest = put(writer=writer, parent=parent)
        except ParentMissing as error:
            logger().warning("stored in full", version=version, reason=str(error))
            parent = None
            manifest = put(writer=writer)
        before = parent.cost if parent is not None else ChainCost(manifest.object_size)
        self._parent = ParentWeights(
            Parent(version, manifest.digest), {tensor.name: tensor.raw for tensor in weights}, before.after(manifest)
        )
        return manifest
