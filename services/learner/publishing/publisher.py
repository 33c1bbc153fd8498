"""Publishes versions: stores the weights first, then announces the version."""

import time
from collections.abc import Callable

import torch

from palimpsest.common import failpoints
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.logs import logger
from palimpsest.common.messages import CONTROL, ControlChanged, RunFinished, VersionPublished, encode
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import SnapshotClient, VersionConflict
from palimpsest.common.snapshots.manifest import Canary, Manifest
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.publishing.version_weights import VersionWeights, WholeWeights

LEASE = "learner"
RENEW_S = 3600.0
"""Seconds after which a learner that trains no version takes its lease again. The store ends a lease after a day."""


class Publisher:
    """Publishes the model's current weights as a version."""

    def __init__(
        self,
        bus: Bus,
        store: SnapshotClient,
        writer: Writer,
        model: torch.nn.Module,
        canaries: Canaries,
        *,
        run: str,
        clock: Callable[[], float] = time.monotonic,
        weights: VersionWeights | None = None,
        adapter: Adapter | None = None,
        free_memory: Callable[[], None] | None = None,
    ) -> None:
        """weights: None: those of the model. adapter: what the model's are; None: whole weights. free_memory: called
        before each announcement, upon which engines that sleep take back their memory; None: engines do not sleep."""
        self._free_memory = free_memory
        self._weights = weights or WholeWeights(store, model, run=run, adapter=adapter)
        self._clock, self._leased = clock, (Version(0), clock())
        self._bus, self._store, self._writer, self._run = bus, store, writer, run
        self.canaries = canaries

    def prepare(self) -> tuple[Canary, ...]:
        """Copy the model's weights, so that later changes of the model do not change the version. Return its canaries.

        Only the loop's thread may call it.
        """
        self._weights.copy()
        return self.canaries.made()

    def publish(self, version: Version, *, now: float, prepared: tuple[Canary, ...] | None = None) -> Manifest:
        """Store the weights, then announce the version.

        now: Unix time in seconds. prepared: result of `prepare`; None: prepare the present weights.

        Another thread may call it for the version that the loop's thread has prepared last.

        If storing fails, the version is not announced. Raises Fenced if another learner has the run; then the version
        is not announced either.
        """
        canaries = self.prepare() if prepared is None else prepared
        manifest = self._weights.store(version, canaries, writer=self._writer.epoch)
        if self._free_memory is not None:
            self._free_memory()
        failpoints.reach("learner.before_announcing")
        self._writer.confirm()  # a successor has announced the version that it continues from
        announcement = VersionPublished(
            run=self._run, version=version, digest=manifest.digest, published_at=now, writer=self._writer.epoch
        )
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(announcement))])
        logger().debug(
            "published",
            version=version,
            digest=manifest.digest[:16],
            bytes=manifest.object_size,
            encoding=manifest.encoding,
        )
        return manifest

    def record_change(self, change: ControlChanged) -> None:
        """Put the record of a change on the log. Raises Fenced if another learner has the run."""
        self._writer.confirm()
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(change))])

    def republish(self, version: Version, *, now: float) -> Manifest:
        """Publish after a restart: as `version` if the store holds no later version, else as the next free number.

        A learner that died may have published later versions than its checkpoint holds. They stay valid (tokens that
        they sampled are scored with them), so their numbers are not used again. Raises UserError if the store holds
        other weights as `version` and no checkpoint: then the run begins again with what its files hold now.
        """
        newest = self._store.newest_version()
        try:
            return self.publish(version if newest <= version else Version(newest + 1), now=now)
        except VersionConflict as conflict:
            if self._writer.committed():
                raise
            raise UserError(
                f"version {version} of run {self._run} was published with other weights than the learner has now "
                f"({conflict}). The run has no checkpoint yet, so it begins again from the files of model.path and "
                f"learner.lora.start: one of them was changed or replaced since. Restore the files and resume, or "
                f"start a new run (run.id) from the new ones"
            ) from None

    def keep_from(self, lowest: Version) -> None:
        """Release the snapshots of versions below `lowest`."""
        self._leased = Version(max(0, lowest)), self._clock()
        self._store.lease(LEASE, self._leased[0])

    def renew_lease(self) -> None:
        """Take the lease again if it is an hour old: during a long pause the store must keep the versions."""
        lowest, leased = self._leased
        if self._clock() - leased > RENEW_S:
            self.keep_from(lowest)

    def finish(self, version: Version, *, trained: int) -> None:
        """Announce the end of the run after `trained` versions. Raises Fenced if another learner has the run and may
        continue it."""
        self._writer.confirm()
        end = RunFinished(run=self._run, version=version, writer=self._writer.epoch, versions=trained)
        self._bus.publish(CONTROL, [Outgoing(self._run, encode(end))])
