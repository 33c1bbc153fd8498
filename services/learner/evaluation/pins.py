"""Pins of evaluated versions: the one under evaluation, and the best."""

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.retrying_http import StoreUnavailable
from palimpsest.common.versions import Version

IN_PROGRESS, BEST = "evaluation", "best"
"""Names of the pins. `palimpsest export RUN --version N` writes a pinned version as a model."""


class EvaluationPins:
    """Keeps two pins in the store. A version that is gone is not pinned, which the log says."""

    def __init__(self, store: SnapshotClient) -> None:
        self._store = store

    def move(self, name: str, version: Version | None) -> None:
        """Pin this version under the name, and release the name from every other version. None: only release it."""
        try:
            if version is not None:
                self._store.request("PUT", f"/v1/pins/{version}", {"name": name})
            self._release_others(name, version)
        except StoreUnavailable as error:  # the store answers, but refuses: the run continues without the pin
            logger().warning("version not pinned", version=version, pin=name, reason=str(error))

    def _release_others(self, name: str, version: Version | None) -> None:
        pins: dict[str, dict[str, float | None]] = self._store.request("GET", "/v1/pins")["pins"]
        for other, names in pins.items():
            if name in names and other != str(version):
                self._store.request("DELETE", f"/v1/pins/{other}?name={name}")
