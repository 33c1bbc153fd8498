"""Versions: stored first, announced afterwards."""

import torch

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.logs import logger
from palimpsest.common.messages import CONTROL, RunFinished, VersionPublished, encode
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.publishing.canaries import Canaries

LEASE = "learner"


class Publisher:
    """Makes the model's present weights a version."""

    def __init__(
        self,
        bus: Bus,
        store: SnapshotClient,
        writer: Writer,
        model: torch.nn.Module,
        canaries: Canaries,
        *,
        run: str,
    ) -> None:
        self._bus, self._store, self._writer, self._model, self._run = bus, store, writer, model, run
        self.canaries = canaries

    def publish(self, version: Version, *, now: float) -> Manifest:
        """Store the weights whole, then tell. Whatever fails in between, nobody hears of this version.

        Raises Fenced, and nobody hears either.
        """
        weights = raw_tensors(named_weights(self._model))
        manifest = self._store.put(self._run, version, weights, self.canaries.made(), writer=self._writer.epoch)
        failpoints.reach("learner.before_announcing")
        self._writer.confirm()  # its successor has announced what it goes on from
        announcement = VersionPublished(run=self._run, version=version, digest=manifest.digest, published_at=now)
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(announcement))])
        logger().debug("published", version=version, digest=manifest.digest[:16], bytes=manifest.object_size)
        return manifest

    def republish(self, version: Version, *, now: float) -> Manifest:
        """After a restart: `version` if no other weights have its number yet, else the next free number.

        A learner that died after publishing later versions than its checkpoint holds has left them behind. They stay
        valid (tokens they sampled are scored with them), but their numbers are taken.
        """
        newest = max(self._store.versions(), default=Version(-1))
        return self.publish(version if newest <= version else Version(newest + 1), now=now)

    def keep_from(self, lowest: Version) -> None:
        """Nothing below this version is needed any more."""
        self._store.lease(LEASE, Version(max(0, lowest)))

    def finish(self, version: Version) -> None:
        """Tell that the run is over. Raises Fenced: it may not be, for the successor."""
        self._writer.confirm()
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(RunFinished(run=self._run, version=version)))])
