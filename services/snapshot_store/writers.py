"""Fencing: the epoch of the newest writer, and the accepted checkpoints.

    writers/<epoch>.json                  {"holder": name}; the highest epoch may write
    checkpoints/<version>-<epoch>.json    {"digest": ...}: the accepted checkpoint of that version by that writer

The store issues an epoch by creating its file; of concurrent requests, one succeeds, on every storage. One lock
covers issuing an epoch and checking and writing for a writer: after an epoch is issued, no write of an earlier writer
succeeds. This holds for one store process; a run has one.
"""

import asyncio
import re
from typing import TypeVar

import msgspec
from msgspec import Struct

from palimpsest.common import failpoints
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.storage import Storage

T = TypeVar("T")
_EPOCH = re.compile(r"writers/(\d+)\.json")
_COMMIT = re.compile(r"checkpoints/(\d+)-(\d+)\.json")


class WriterEpoch(Struct, frozen=True):
    """A learner's right to write."""

    epoch: int
    """Counted from 1; each is issued once."""
    holder: str
    """The name that the writer gave."""


class CheckpointCommit(Struct, frozen=True):
    """An accepted checkpoint."""

    version: Version
    writer: int
    digest: str
    """blake3 of its manifest, hex."""


class StaleWriter(Exception):
    """A newer writer exists; the message names both writers."""


class UnknownWriter(Exception):
    """This store never issued the epoch."""


class CommitConflict(Exception):
    """The writer has committed another checkpoint of this version."""


class _Holder(Struct, frozen=True, forbid_unknown_fields=True):
    holder: str


class _Digest(Struct, frozen=True, forbid_unknown_fields=True):
    digest: str


class Writers:
    """Epochs and commits over a Storage; `changing` is the catalog's lock."""

    def __init__(self, storage: Storage, changing: asyncio.Lock) -> None:
        self._storage, self._changing = storage, changing
        self._epoch = 0

    async def open(self) -> None:
        """Read epochs and commits. Raises Damaged with the checkpoint's file."""
        for key in await self._storage.keys("writers/"):
            if match := _EPOCH.fullmatch(key):
                self._epoch = max(self._epoch, int(match[1]))
        await self.committed()

    async def newest(self) -> WriterEpoch | None:
        """Return the writer that may write, by the current state of the storage; None before the first one."""
        while await self._storage.read(_writer_key(self._epoch + 1)) is not None:
            self._epoch += 1
        return await self._writer(self._epoch) if self._epoch else None

    async def issue(self, holder: str) -> int:
        """Issue an epoch above all earlier ones; from now on the earlier writers are refused."""
        async with self._changing:
            body = msgspec.json.encode(_Holder(holder))
            while not await self._storage.create(_writer_key(self._epoch + 1), body):
                self._epoch += 1  # another request took it
            self._epoch += 1
            return self._epoch

    async def check(self, epoch: int) -> None:
        """Raise StaleWriter or UnknownWriter unless this is the newest epoch. Hold the lock until the write is done."""
        if failpoints.active("store.skip_fencing"):
            return
        newest = await self.newest()
        if newest is None or not 0 < epoch <= newest.epoch:
            raise UnknownWriter(f"this store never issued epoch {epoch}; its newest is {self._epoch}")
        if epoch < newest.epoch:
            replaced = await self._writer(epoch)
            raise StaleWriter(
                f"writer {replaced.epoch} ({replaced.holder}) was replaced by writer {newest.epoch} ({newest.holder})"
            )

    async def commit(self, version: Version, writer: int, digest: str) -> bool:
        """Accept a checkpoint; False if it already is. Raises StaleWriter, UnknownWriter, CommitConflict."""
        async with self._changing:
            await self.check(writer)
            key = _commit_key(version, writer)
            if await self._storage.create(key, msgspec.json.encode(_Digest(digest))):
                return True
            existing = await self._read_commit(key)
            if existing.digest != digest:
                raise CommitConflict(
                    f"writer {writer} has committed a checkpoint of version {version} with digest "
                    f"{existing.digest[:16]}, not {digest[:16]}"
                )
            return False

    async def withdraw(self, version: Version, writer: int, *, by: int) -> None:
        """Withdraw a checkpoint; no effect if it is not accepted. Raises StaleWriter, UnknownWriter for `by`."""
        async with self._changing:
            await self.check(by)
            await self._storage.delete(_commit_key(version, writer))

    async def committed(self) -> list[CheckpointCommit]:
        """Return the accepted checkpoints, oldest first. Raises Damaged."""
        found = [await self._read_commit(key) for key in await self._storage.keys("checkpoints/") if _COMMIT.match(key)]
        return sorted(found, key=lambda commit: (commit.version, commit.writer))

    async def _writer(self, epoch: int) -> WriterEpoch:
        try:
            return WriterEpoch(epoch, (await self._read(_writer_key(epoch), _Holder)).holder)
        except Damaged:
            return WriterEpoch(epoch, "its name is damaged")  # only for messages; the key has the epoch

    async def _read_commit(self, key: str) -> CheckpointCommit:
        match = _COMMIT.fullmatch(key)
        assert match
        return CheckpointCommit(Version(int(match[1])), int(match[2]), (await self._read(key, _Digest)).digest)

    async def _read(self, key: str, kind: type[T]) -> T:
        body = await self._storage.read(key)
        try:
            return msgspec.json.decode(body or b"", type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Damaged(f"{key}: {error}") from None


def _writer_key(epoch: int) -> str:
    return f"writers/{epoch:08d}.json"


def _commit_key(version: Version, writer: int) -> str:
    return f"checkpoints/{version:08d}-{writer:08d}.json"
