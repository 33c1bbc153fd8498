"""The names in use, kept in the storage, so that a restarted store knows their holders.

    members.json    role/name -> {"instance": id, "holder": text}

Without it, a second process of a name could take the name before its holder renews it. The file changes when another
process holds a name, not at renewals.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.services.snapshot_store.members import Members, NameHolder
from palimpsest.services.snapshot_store.storage import Storage

KEY = "members.json"


class KeptMembers:
    """Members over a Storage. One store process may have it."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._members = storage, Members(clock=clock)
        self._kept: dict[str, NameHolder] = {}
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """Read the names; each is held for a full lease from now on. Raises Damaged."""
        if (body := await self._storage.read(KEY)) is not None:
            try:
                self._kept = msgspec.json.decode(body, type=dict[str, NameHolder])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Damaged(f"{KEY}: {error}") from None
            self._members.restore(self._kept)

    async def take(self, name: str, instance: str, holder: str, *, replaces: str = "") -> None:
        """See Members.take. It returns when the holder is stored. Raises NameTaken, Unavailable."""
        async with self._changing:
            self._members.take(name, instance, holder, replaces=replaces)
            await self._keep()

    async def release(self, name: str, instance: str) -> None:
        """See Members.release. Raises Unavailable."""
        async with self._changing:
            self._members.release(name, instance)
            await self._keep()

    async def _keep(self) -> None:
        if (holders := self._members.holders()) == self._kept:
            return

        async def whole() -> AsyncIterator[bytes]:
            yield msgspec.json.encode(holders)

        await self._storage.put(KEY, whole())
        self._kept = holders  # only now: a request that failed is written by its repetition
