"""Pins: versions that stay until a person releases them, or until a time.

    pins.json                    version -> name -> Unix time of the end, or null

A version may have several pins, each with a name. A pin keeps the version and those on which it depends. Expiry follows
the wall clock, since a pin outlives the store's process.
"""

import time
from collections.abc import AsyncIterator, Callable

import msgspec

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.storage import Storage

KEY = "pins.json"
MOST = 1000
"""Maximum number of pins of a run."""
_Pins = dict[int, dict[str, float | None]]


class TooManyPins(Exception):
    """The run has MOST pins."""


class Pins:
    """Pins over a Storage. The caller serializes the changes. `clock`: Unix time in seconds."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.time) -> None:
        self._storage, self._clock = storage, clock
        self._pins: _Pins = {}

    async def open(self) -> None:
        """Read the pins. Raises Damaged."""
        if (body := await self._storage.read(KEY)) is not None:
            try:
                self._pins = msgspec.json.decode(body, type=_Pins)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Damaged(f"{KEY}: {error}") from None

    def all(self) -> dict[Version, dict[str, float | None]]:
        """Return the pins that hold now: version -> name -> end (Unix seconds), None without an end."""
        now = self._clock()
        held = {
            Version(version): {name: end for name, end in names.items() if end is None or end > now}
            for version, names in sorted(self._pins.items())
        }
        return {version: names for version, names in held.items() if names}

    async def pin(self, version: Version, name: str, *, seconds: float | None) -> float | None:
        """Pin a version durably, or renew the pin of this name. Return its end. Raises TooManyPins."""
        pins = self.all()
        own = pins.setdefault(version, {})
        if name not in own and sum(map(len, pins.values())) >= MOST:
            raise TooManyPins(f"the run has {MOST} pins: release some")
        own[name] = end = None if seconds is None else self._clock() + seconds
        await self._write(pins)
        return end

    async def unpin(self, version: Version, name: str) -> bool:
        """Release a pin durably. Return whether it existed."""
        pins = self.all()
        if name not in pins.get(version, {}):
            return False
        del pins[version][name]
        await self._write(pins)
        logger().info("pin released", version=version, name=name)
        return True

    async def _write(self, pins: dict[Version, dict[str, float | None]]) -> None:
        text = msgspec.json.encode({int(version): names for version, names in pins.items() if names})

        async def whole() -> AsyncIterator[bytes]:
            yield text

        await self._storage.put(KEY, whole())
        self._pins = {int(version): names for version, names in pins.items()}
