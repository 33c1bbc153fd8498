"""Updates the engine to new versions while trajectories are in flight: fetch, pause, load, resume, verify.

The learner never waits for an update. The worker keeps the present weights in a file. While it samples, it patches the
file to the next version with the deltas that it lacks, and checks the digests; only loading pauses the engine. Tokens
sampled afterward stay in the worker until the canaries show that the engine computes what the learner published
(canary.py). If they do not, the worker refuses the version and publishes none of its tokens.

At a cut the engine pauses. It stays paused until it may sample with a version newer than the cut's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.adapter import Adapter, refuse_other_adapter
from palimpsest.common.snapshots.client import SnapshotClient, VersionMissing
from palimpsest.common.snapshots.manifest import Damaged, Manifest
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.shared_objects import SharedObjects
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine.port import Engine, StoredWeights, WrongWeights
from palimpsest.services.rollout.engine.required import required


class UpdateResult:
    """The outcome of an update."""

    def __init__(self, manifest: Manifest, *, accepted: bool, canary_error: float, pause_s: float) -> None:
        self.manifest, self.accepted = manifest, accepted
        self.canary_error, self.pause_s = canary_error, pause_s


class WeightSync:
    """Keeps an engine at the newest announced version that it may sample with."""

    def __init__(
        self,
        engine: Engine,
        store: SnapshotClient,
        folder: Path,
        *,
        tolerance: float | None,
        report: Callable[[UpdateResult], None],
        shared: Path | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """folder: holds the present weights. shared: the folder of downloads for all workers of this machine; None: one
        beside `folder`. adapter: what the versions are; None: whole weights."""
        self._adapter = adapter
        self._engine, self._store, self._folder = engine, store, folder
        self._tolerance, self._report = tolerance, report
        self._announced = asyncio.Event()
        self._newest = Version(-1)
        self._change = asyncio.Condition()
        self._turn = asyncio.Lock()
        """Guards pausing and resuming the engine. An update holds it from loading until the verdict, so that a cut
        finds only verified tokens on the engine."""
        self._loaded = self._held = Version(-1)
        self._still_since: float | None = None
        self._evaluated: Version | None = None
        """Version that an evaluation needs; None without one."""
        self.verified = Version(-1)
        """Newest version that the canaries verified; -1 before the first."""
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()
        self._weights = RawFile(folder / "weights.raw")
        self._walker = Walker(SharedObjects(store, shared or folder.with_name(f"{folder.name}-objects")), self._weights)

    def announce(self, version: Version) -> None:
        """Note that the store holds a version."""
        if version > self._newest:
            self._newest = version
            self._announced.set()

    async def wait_verified(self, version: Version) -> None:
        """Wait until the version is verified."""
        async with self._change:
            await self._change.wait_for(lambda: self.verified >= version)

    async def wait_unless_evaluating(self, version: Version) -> bool:
        """Wait until the version is verified. Return False as soon as an evaluation needs an older one."""
        async with self._change:
            await self._change.wait_for(lambda: self.verified >= version or self._is_after_evaluated(version))
            return self.verified >= version

    async def evaluate(self, version: Version | None) -> None:
        """Load no version after this one, which an evaluation needs. None: the evaluation has ended."""
        async with self._change:
            self._evaluated = version
            self._change.notify_all()
        self._announced.set()  # a later version may be loadable now

    def _is_after_evaluated(self, version: Version) -> bool:
        return self._evaluated is not None and version > self._evaluated

    async def wait_first_version(self) -> None:
        """Wait until the first version is verified."""
        await self.wait_verified(Version(0))

    @asynccontextmanager
    async def paused_for_cut(self, version: Version) -> AsyncIterator[None]:
        """Pause the engine. Inside the block, all sampled tokens come from verified versions.

        Afterward the engine samples nothing with `version` or an older one. It stays paused until a newer version is
        announced and loaded, or until `release_hold` permits the loaded version.
        """
        async with self._turn:
            self._held = max(self._held, version)
            if self._still_since is None:
                self._still_since = time.monotonic()
            await self._engine.pause()
            await self.wait_verified(self._loaded)  # never returns after a refusal, which ends the worker
            yield
            await self._resume_unless_held()

    async def release_hold(self, held: Version) -> None:
        """Lower the hold to `held`: versions newer than it may be sampled again."""
        if held >= self._held:
            return
        async with self._turn:
            self._held = held
            await self._resume_unless_held()
        self._announced.set()  # an announced version may be loadable now

    async def sync_loop(self) -> None:
        """Apply announced versions in an endless loop, always the newest one.

        Raises UserError if the canaries or the engine refuse a version.
        """
        while True:
            await self._announced.wait()
            self._announced.clear()
            version = self._newest if self._evaluated is None else min(self._newest, self._evaluated)
            if version <= max(self.verified, self._held):
                continue
            weights = await self._fetch(version)
            if weights is not None:
                async with self._turn:
                    if version > self._held:  # a cut may have begun during the download
                        await self._apply(weights)

    async def _resume_unless_held(self) -> None:
        if self._loaded <= self._held:
            return
        await self._engine.resume()
        if self._still_since is not None:
            instruments.HOLD_SECONDS.observe(time.monotonic() - self._still_since)
            self._still_since = None

    async def _fetch(self, version: Version) -> StoredWeights | None:
        try:
            with instruments.FETCH_SECONDS.time():
                moved = await asyncio.to_thread(self._walker.move, version)
        except VersionMissing as error:
            # The store deleted the version because a newer one exists; the announcement of that one follows.
            logger().info("version skipped", version=version, reason=str(error))
            return None
        except (Damaged, ValueError) as error:
            raise UserError(
                f"the snapshot store returned damaged weights: {error}. The worker serves only verified weights: "
                f"restore the store's folder from a backup, then start again",
                ExitCode.DAMAGED,
            ) from None
        manifest = self._walker.manifest
        assert manifest is not None
        if not self._weights.has_order_of(manifest):
            await asyncio.to_thread(self._weights.sort_as, manifest)  # the engine reads them in this order
        refuse_other_adapter(manifest.adapter, self._adapter, f"version {version}")
        instruments.FETCHED_BYTES.inc(moved.bytes)
        return StoredWeights(manifest, self._weights.path)

    async def _apply(self, weights: StoredWeights) -> None:
        manifest = weights.manifest
        started = time.monotonic()
        with required(f"an update to version {manifest.version}"):
            await self._engine.pause()
            try:
                await self._engine.load(weights)
            except WrongWeights as error:
                instruments.UPDATES.labels("refused").inc()
                raise UserError(
                    f"refused version {manifest.version}: the engine reads back {error}. Its weight update is broken",
                    ExitCode.CANARY,
                ) from None
            self._loaded = manifest.version
            await self._resume_unless_held()
        pause_s = time.monotonic() - started
        instruments.PAUSE_SECONDS.observe(pause_s)
        with required(f"to score the canaries of version {manifest.version}"):
            scores = await asyncio.gather(*(self._engine.score(canary.tokens) for canary in manifest.canaries))
        verdict = judge(scores, manifest.canaries, tolerance=self._tolerance)
        instruments.CANARY_ERROR.set(verdict.error)
        instruments.UPDATES.labels("accepted" if verdict.accepted else "refused").inc()
        self._report(UpdateResult(manifest, accepted=verdict.accepted, canary_error=verdict.error, pause_s=pause_s))
        if not verdict.accepted:
            raise UserError(f"refused version {manifest.version}: {verdict.reason()}", ExitCode.CANARY)
        instruments.VERSION.set(manifest.version)
        async with self._change:
            self.verified = manifest.version
            self._change.notify_all()
        logger().info(
            "version",
            version=manifest.version,
            pause_ms=round(1e3 * pause_s, 1),
            canary=round(verdict.error, 5),
            tolerance=round(verdict.tolerance, 5),
            leaning=round(verdict.leaning, 1),
            detectable=round(min(verdict.detectable, 1e9), 3),
        )
