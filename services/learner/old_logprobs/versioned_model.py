"""A model that is one version at a time, by the weights in the store."""

import torch

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import load_weights


class VersionedModel:
    """Its weights are whatever version it was told to be last."""

    def __init__(self, model: torch.nn.Module, store: SnapshotClient) -> None:
        self.model, self._store = model, store
        self.version: Version | None = None
        """None before the first, and while it changes."""
        self.digest = ""
        """Of its version's weights."""

    def load_version(self, version: Version) -> bool:
        """Be this version from now on; whether its weights had to be loaded.

        Raises VersionMissing if the store does not have it, UserError if it is damaged or another model's.
        """
        if version == self.version:
            return False
        try:
            manifest = self._store.manifest(version)
            self.version = None  # neither version while it changes
            load_weights(self.model, self._store.tensors(manifest))
        except (Damaged, ValueError) as damage:
            raise UserError(
                f"old log-probs cannot be computed: snapshot {version} is damaged: {damage}. Restore the store's "
                f"folder from a copy, then start again with --resume",
                ExitCode.DAMAGED,
            ) from None
        self.version, self.digest = version, manifest.digest
        return True
