"""The right of a learner to write to the store.

The newest writer has the right. A new writer replaces the previous one, whose next request fails with Fenced.
"""

import os
import socket
from dataclasses import dataclass

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint."""

    version: Version
    writer: int
    digest: str
    """blake3 of its manifest, hex."""


class Writer:
    """Writer of one learner. After another learner calls `begin`, every method except `begin` and `committed` raises
    Fenced."""

    def __init__(self, store: SnapshotClient, holder: str | None = None) -> None:
        self._store = store
        self._holder = holder or f"{socket.gethostname()}, process {os.getpid()}"
        self.epoch = 0
        """Epoch of this writer: 0 before `begin`, at least 1 after it."""

    def begin(self) -> None:
        """Take over the run. From then on the store refuses every earlier writer."""
        self.epoch = self._store.request("POST", "/v1/writers", {"holder": self._holder})["epoch"]

    def confirm(self) -> None:
        """Raise Fenced if another learner took over the run."""
        self._store.request("GET", f"/v1/writers/{self.epoch}")

    def committed(self) -> list[Committed]:
        """Return the committed checkpoints of all writers, oldest first."""
        return [Committed(**commit) for commit in self._store.request("GET", "/v1/checkpoints")["checkpoints"]]

    def commit(self, version: Version, digest: str) -> Committed:
        """Commit this writer's checkpoint of the version. `digest`: digest of its manifest. Idempotent."""
        self._store.request("PUT", f"/v1/checkpoints/{version}/{self.epoch}", {"digest": digest})
        return Committed(version, self.epoch, digest)

    def withdraw(self, commit: Committed) -> None:
        """Withdraw the commit of a checkpoint."""
        self._store.request("DELETE", f"/v1/checkpoints/{commit.version}/{commit.writer}?by={self.epoch}")
