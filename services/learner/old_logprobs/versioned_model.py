"""A model that holds one version at a time, moved from version to version along the deltas in the snapshot store."""

from typing import Protocol

import torch

from palimpsest.common.snapshots.adapter import Adapter, refuse_other_adapter
from palimpsest.common.snapshots.ahead import FetchAhead
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.snapshots.walker import VersionSource, Walker
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import EditableModel


class MovableModel(Protocol):
    """A model that holds one version at a time. VersionedModel is one."""

    @property
    def model(self) -> torch.nn.Module:
        """The model, whose weights each load changes in place."""

    @property
    def version(self) -> Version | None:
        """See VersionedModel."""

    def load_version(self, version: Version) -> bool:
        """See VersionedModel."""

    def expect(self, version: Version) -> None:
        """See VersionedModel."""


class VersionedModel:
    """A model and the version whose weights it holds."""

    def __init__(self, model: torch.nn.Module, store: VersionSource, adapter: Adapter | None = None) -> None:
        """adapter: of the model; None if its weights are whole."""
        self.model, self._adapter = model, adapter
        self._ahead = FetchAhead(store)
        self._walker = Walker(self._ahead, EditableModel(model, adapter))

    @property
    def version(self) -> Version | None:
        """None before the first load, and during a load."""
        return self._walker.manifest.version if self._walker.manifest is not None else None

    @property
    def digest(self) -> str:
        """Digest of the version's weights; empty without a version."""
        return self._walker.manifest.digest if self._walker.manifest is not None else ""

    def load_version(self, version: Version) -> bool:
        """Move to this version's weights; return False if the model holds them already.

        Raises VersionMissing if the store does not hold the version, UserError if it is damaged or of another model.
        """
        if version == self.version:
            return False
        try:
            self._walker.move(version)
        except (Damaged, ValueError) as error:
            raise damaged(version, error) from None
        assert self._walker.manifest is not None
        refuse_other_adapter(self._walker.manifest.adapter, self._adapter, f"version {version}")
        return True

    def expect(self, version: Version) -> None:
        """Fetch in a thread what a move to this version will need. A failure changes nothing."""
        if self.version is not None:
            self._ahead.begin(self.version, version)


def damaged(version: Version, error: Exception) -> UserError:
    """Return the error for a version whose weights cannot be loaded."""
    return UserError(
        f"old log-probs cannot be computed: snapshot {version} is damaged: {error}. Restore the store's folder from a "
        f"copy, then continue with --resume",
        ExitCode.DAMAGED,
    )
