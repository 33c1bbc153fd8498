"""Taking on new versions while trajectories live: fetch, pause, load, resume, verify.

The learner never waits for this. A version is fetched and checked against its digests while sampling goes on; only
loading stands in the way of it. What the engine samples afterwards stays in the worker until the canaries have shown
that the engine computes what the learner published (canary.py). A version that fails is refused, and nothing it sampled
is ever published.

At a cut the engine stands still, and stays so: the version of the cut, or an older one, is sampled with no more.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from palimpsest.common.files import atomic_write
from palimpsest.common.logs import logger
from palimpsest.common.snapshots.client import SnapshotClient, VersionMissing
from palimpsest.common.snapshots.manifest import Damaged, Manifest
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine.port import Engine, StoredWeights
from palimpsest.services.rollout.engine.required import required


class UpdateResult:
    """What came of an update."""

    def __init__(self, manifest: Manifest, *, accepted: bool, canary_error: float, pause_s: float) -> None:
        self.manifest, self.accepted = manifest, accepted
        self.canary_error, self.pause_s = canary_error, pause_s


class WeightSync:
    """Keeps an engine at the newest version announced that may be sampled with."""

    def __init__(
        self,
        engine: Engine,
        store: SnapshotClient,
        folder: Path,
        *,
        tolerance: float,
        report: Callable[[UpdateResult], None],
    ) -> None:
        self._engine, self._store, self._folder = engine, store, folder
        self._tolerance, self._report = tolerance, report
        self._announced = asyncio.Event()
        self._newest = Version(-1)
        self._change = asyncio.Condition()
        self._turn = asyncio.Lock()
        """Whoever has it decides whether the engine runs. From a version's loading until its verdict it is kept, so
        that what a cut finds on the engine is verified."""
        self._loaded = self._held = Version(-1)
        self._still_since: float | None = None
        self.verified = Version(-1)
        """Newest version the engine is known to compute rightly; -1 before the first."""
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()

    def announce(self, version: Version) -> None:
        """A version stands in the store."""
        if version > self._newest:
            self._newest = version
            self._announced.set()

    async def wait_verified(self, version: Version) -> None:
        """Wait until the version is verified."""
        async with self._change:
            await self._change.wait_for(lambda: self.verified >= version)

    async def wait_first_version(self) -> None:
        """Wait until there is any version to sample with."""
        await self.wait_verified(Version(0))

    @asynccontextmanager
    async def paused_for_cut(self, version: Version) -> AsyncIterator[None]:
        """Inside, the engine stands still, and everything it has sampled is verified.

        Afterwards nothing is sampled with `version` or an older one: the engine stands still until a newer version is
        loaded, which needs no more than its announcement, or until `let_go` allows for the one it has.
        """
        async with self._turn:
            self._held = max(self._held, version)
            if self._still_since is None:
                self._still_since = time.monotonic()
            await self._engine.pause()
            await self.wait_verified(self._loaded)  # if it was refused, this never comes: the worker is about to end
            yield
            await self._resume_unless_held()

    async def release_hold(self, held: Version) -> None:
        """From now on nothing is sampled with `held` or an older one, but what is newer may be."""
        if held >= self._held:
            return
        async with self._turn:
            self._held = held
            await self._resume_unless_held()
        self._announced.set()  # what was held may be loaded now

    async def sync_loop(self) -> None:
        """Apply what is announced, newest first, for ever.

        Raises UserError when a version is refused: by its canaries, or by an engine that does not take it on.
        """
        while True:
            await self._announced.wait()
            self._announced.clear()
            wanted = self._newest
            if wanted <= max(self.verified, self._held):
                continue
            weights = await self._fetch(wanted)
            if weights is not None:
                async with self._turn:
                    if wanted > self._held:  # else a cut came in between
                        await self._apply(weights)
                weights.path.unlink()

    async def _resume_unless_held(self) -> None:
        if self._loaded <= self._held:
            return
        await self._engine.resume()
        if self._still_since is not None:
            instruments.HOLD_SECONDS.observe(time.monotonic() - self._still_since)
            self._still_since = None

    async def _fetch(self, version: Version) -> StoredWeights | None:
        path = self._folder / f"{version}.raw"
        try:
            with instruments.FETCH_SECONDS.time():
                manifest = await asyncio.to_thread(self._download, version, path)
        except VersionMissing as missing:
            # swept because a newer one stands: its announcement is on the way
            logger().info("version skipped", version=version, reason=str(missing))
            return None
        except Damaged as damage:
            raise UserError(
                f"the snapshot store gave damaged weights: {damage}. This worker serves nothing it cannot verify: "
                f"restore the store's folder from a copy, then start again",
                ExitCode.DAMAGED,
            ) from None
        return StoredWeights(manifest, path)

    def _download(self, version: Version, path: Path) -> Manifest:
        manifest = self._store.manifest(version)
        with atomic_write(path) as file:
            for part in _bytes(self._store, manifest):
                file.write(part)
        return manifest

    async def _apply(self, weights: StoredWeights) -> None:
        manifest = weights.manifest
        started = time.monotonic()
        with required(f"an update to version {manifest.version}"):
            await self._engine.pause()
            await self._engine.load(weights)
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
            raise UserError(f"version {manifest.version} is refused: {verdict.reason()}", ExitCode.CANARY)
        instruments.VERSION.set(manifest.version)
        async with self._change:
            self.verified = manifest.version
            self._change.notify_all()
        logger().info(
            "version",
            version=manifest.version,
            pause_ms=round(1e3 * pause_s, 1),
            canary=round(verdict.error, 5),
            leaning=round(verdict.leaning, 1),
        )


def _bytes(store: SnapshotClient, manifest: Manifest) -> Iterator[bytes]:
    names = [entry.name for entry in manifest.tensors]
    for name, tensor in zip(names, store.tensors(manifest), strict=True):
        if tensor.name != name:
            raise Damaged(f"version {manifest.version}: tensor {tensor.name} stands where {name} should")
        yield tensor.raw.tobytes()
