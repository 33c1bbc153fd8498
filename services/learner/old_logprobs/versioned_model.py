"""A model that holds one version at a time, loaded from the snapshot store."""

import torch

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import load_weights


class VersionedModel:
    """A model and the version whose weights it holds."""

    def __init__(self, model: torch.nn.Module, store: SnapshotClient) -> None:
        self.model, self._store = model, store
        self.version: Version | None = None
        """None before the first load, and during a load."""
        self.digest = ""
        """Digest of the version's weights."""

    def load_version(self, version: Version) -> bool:
        """Load this version's weights; return False if the model holds them already.

        Raises VersionMissing if the store does not hold the version, UserError if it is damaged or of another model.
        """
        if version == self.version:
            return False
        try:
            manifest = self._store.manifest(version)
            self.version = None  # during the load the weights are of no version
            load_weights(self.model, self._store.tensors(manifest))
        except (Damaged, ValueError) as error:
            raise UserError(
                f"old log-probs cannot be computed: snapshot {version} is damaged: {error}. Restore the store's "
                f"folder from a copy, then continue with --resume",
                ExitCode.DAMAGED,
            ) from None
        self.version, self.digest = version, manifest.digest
        return True
