"""A learner's right to write, as the store gives and takes it.

The newest learner has it. Whoever asks for it replaces the one before, who hears so at its next write or question.
"""

import os
import socket
from dataclasses import dataclass

from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that counts."""

    version: Version
    writer: int
    digest: str
    """blake3 of its manifest, hex."""


class Writer:
    """One learner's. Every method but `begin` and `committed` raises Fenced once another learner has begun."""

    def __init__(self, store: SnapshotClient, holder: str | None = None) -> None:
        self._store = store
        self._holder = holder or f"{socket.gethostname()}, process {os.getpid()}"
        self.epoch = 0
        """From 1 on after `begin`."""

    def begin(self) -> None:
        """Take the run over: from now on the store refuses every earlier writer."""
        self.epoch = self._store.request("POST", "/v1/writers", {"holder": self._holder})["epoch"]

    def confirm(self) -> None:
        """Raise Fenced if another learner has begun."""
        self._store.request("GET", f"/v1/writers/{self.epoch}")

    def committed(self) -> list[Committed]:
        """The checkpoints that count, whoever wrote them; oldest first."""
        return [Committed(**commit) for commit in self._store.request("GET", "/v1/checkpoints")["checkpoints"]]

    def commit(self, version: Version, digest: str) -> Committed:
        """Make this writer's checkpoint of the version count; `digest` is that of its manifest. Harmless again."""
        self._store.request("PUT", f"/v1/checkpoints/{version}/{self.epoch}", {"digest": digest})
        return Committed(version, self.epoch, digest)

    def withdraw(self, commit: Committed) -> None:
        """Let a checkpoint count no longer."""
        self._store.request("DELETE", f"/v1/checkpoints/{commit.version}/{commit.writer}?by={self.epoch}")
