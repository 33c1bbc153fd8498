"""Weight updates: order of update steps, limits on unverified versions, and pauses for cuts."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from palimpsest.common.service import Server
from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.rollout.engine.port import StoredWeights
from palimpsest.services.rollout.weights import UpdateResult, WeightSync
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.rollout.working import turns

CANARY = Canary((1, 2, 3), (1, 2), (-1.0, -2.0), previous=())


class Engine:
    """An engine that records its calls; its canary scores are `off` nats too low."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.off = 0.0
        self.scoring = asyncio.Event()
        self.scoring.set()

    async def pause(self) -> None:
        self.events.append("pause")

    async def load(self, weights: StoredWeights) -> None:
        self.events.append(f"load {weights.manifest.version}: {weights.path.stat().st_size} bytes")

    async def resume(self) -> None:
        self.events.append("resume")

    async def score(self, tokens: Sequence[int]) -> list[float]:
        await self.scoring.wait()
        self.events.append("score")
        return [logprob - self.off for logprob in CANARY.logprobs]


@pytest.fixture
def store(tmp_path: Path):
    app = create_app(DiskStorage(tmp_path / "store"), sweep_s=3600)
    with (
        Server(app, "127.0.0.1", 0, key="snapshot_store") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}", sleep=lambda _: None) as client,
    ):
        Writer(client).begin()
        yield client


def put(store: SnapshotClient, *versions: int) -> None:
    for version in versions:
        raw = np.full(64, version, dtype=np.uint8)
        store.put("test", Version(version), [RawTensor("w", "bfloat16", (4, 8), raw)], [CANARY], writer=1)


def weight_sync(engine: Engine, store: SnapshotClient, folder: Path) -> tuple[WeightSync, list[UpdateResult]]:
    reports: list[UpdateResult] = []
    return WeightSync(engine, store, folder, tolerance=0.05, report=reports.append), reports  # type: ignore[arg-type]


@asynccontextmanager
async def syncing(weights: WeightSync) -> AsyncIterator["asyncio.Task[None]"]:
    """Run the sync loop in a task inside the context."""
    loop = asyncio.create_task(weights.sync_loop())
    try:
        yield loop
    finally:
        loop.cancel()


async def consumed(weights: WeightSync) -> None:
    """Wait until the sync loop has read every announcement."""
    while weights._announced.is_set():
        await asyncio.sleep(0)


def update(version: int) -> list[str]:
    """Calls of an update to this version."""
    return ["pause", f"load {version}: 64 bytes", "resume", "score"]


async def test_a_version_is_fetched_loaded_and_verified_in_this_order(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 3)
    engine = Engine()
    weights, reports = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights):
        weights.announce(Version(3))
        await weights.wait_verified(Version(3))
        assert engine.events == update(3)
        assert [(r.manifest.version, r.accepted, r.canary_error) for r in reports] == [(3, True, 0.0)]


async def test_no_version_is_trusted_before_its_canary_is_scored(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.scoring.clear()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights):
        weights.announce(Version(1))
        waiting = asyncio.create_task(weights.wait_verified(Version(1)))
        while engine.events[-1:] != ["resume"]:
            await asyncio.sleep(0)
        assert not waiting.done()
        assert weights.verified == -1
        engine.scoring.set()
        await waiting
        assert weights.verified == 1


@pytest.mark.parametrize(
    ("off", "message"),
    [
        pytest.param(0.15, r"refused version 2: canary error 0\.1500 nats exceeds", id="head-left-at-the-old-weights"),
        pytest.param(float("nan"), "refused version 2", id="nan"),
        pytest.param(float("inf"), "refused version 2", id="inf"),
    ],
)
async def test_a_version_whose_canary_fails_is_refused(
    store: SnapshotClient, tmp_path: Path, off: float, message: str
) -> None:
    put(store, 1, 2)
    engine = Engine()
    weights, reports = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights) as loop:
        weights.announce(Version(1))
        await weights.wait_verified(Version(1))
        engine.off = off
        weights.announce(Version(2))
        with pytest.raises(UserError, match=message) as error:
            await loop
    assert error.value.code is ExitCode.CANARY
    assert [r.accepted for r in reports] == [True, False]
    assert weights.verified == 1


async def test_only_the_newest_of_several_versions_is_loaded(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1, 2, 3)
    engine = Engine()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    for version in (1, 2, 3, 2):
        weights.announce(Version(version))
    async with syncing(weights):
        await weights.wait_verified(Version(3))
        assert engine.events == update(3)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
async def test_damaged_weights_never_reach_the_engine(store: SnapshotClient, tmp_path: Path, damage: str) -> None:
    put(store, 1)
    stored = tmp_path / "store" / "objects" / store.manifest(Version(1)).object
    body = bytearray(stored.read_bytes())
    if damage == "flip":
        body[-1] ^= 0xFF
    stored.write_bytes(body[:-3] if damage == "truncate" else body)
    engine = Engine()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    weights.announce(Version(1))
    with pytest.raises(UserError, match="returned damaged weights: version 1") as error:
        await weights.sync_loop()
    assert error.value.code is ExitCode.DAMAGED
    assert engine.events == []
    assert list((tmp_path / "cache").iterdir()) == []


async def test_the_cache_holds_the_present_weights_only_and_is_emptied_at_the_start(
    store: SnapshotClient, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "7.raw").write_bytes(b"left")
    put(store, 1)
    weights, _ = weight_sync(Engine(), store, tmp_path / "cache")
    async with syncing(weights):
        weights.announce(Version(1))
        await weights.wait_verified(Version(1))
        await asyncio.sleep(0)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["weights.raw"]


@dataclass(frozen=True)
class Step:
    """One event of a run, and the engine's calls until the next one.

    update: announce a version and wait until it is verified. ignore: announce a version that must not be loaded.
    hold: pause for a cut of a version. release: end the hold, with the newest version that may be sampled with.
    """

    kind: Literal["update", "ignore", "hold", "release"]
    version: int
    calls: list[str]


RUNS: dict[str, tuple[tuple[int, ...], list[Step]]] = {
    "a version swept from the store is skipped": ((2,), [Step("ignore", 1, []), Step("update", 2, update(2))]),
    "a held version and older ones are not loaded": (
        (1, 2, 3),
        [Step("update", 1, update(1)), Step("hold", 2, ["pause"]), Step("ignore", 2, []), Step("update", 3, update(3))],
    ),
    "a release resumes the held version and no older one": (
        (1, 2),
        [
            Step("update", 1, update(1)),
            Step("hold", 1, ["pause"]),
            Step("release", 1, []),
            Step("release", 0, ["resume"]),
            Step("hold", 2, ["pause"]),
            Step("release", 1, []),  # the engine has version 1
            Step("update", 2, update(2)),
        ],
    ),
    "an engine ahead of the held version resumes at once": (
        (2,),
        [Step("update", 2, update(2)), Step("hold", 1, ["pause", "resume"])],
    ),
}
"""Case -> versions in the store, and steps."""


@pytest.mark.parametrize(("stored", "steps"), RUNS.values(), ids=RUNS)
async def test_calls_of_the_engine(
    store: SnapshotClient, tmp_path: Path, stored: tuple[int, ...], steps: list[Step]
) -> None:
    put(store, *stored)
    engine = Engine()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights):
        for number, step in enumerate(steps):
            engine.events.clear()
            version = Version(step.version)
            match step.kind:
                case "update":
                    weights.announce(version)
                    await weights.wait_verified(version)
                case "ignore":
                    weights.announce(version)
                    await consumed(weights)
                case "hold":
                    async with weights.paused_for_cut(version):
                        assert engine.events == ["pause"]
                case "release":
                    await weights.release_hold(version)
            assert engine.events == step.calls, f"step {number}: {step.kind} {version}"


async def test_a_version_fetched_before_its_hold_is_not_loaded_until_the_release(
    store: SnapshotClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    engine = Engine()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    fetched = 0
    real = weights._fetch

    async def fetch(version: Version) -> StoredWeights | None:
        nonlocal fetched
        stored = await real(version)
        async with weights.paused_for_cut(Version(1)):
            fetched += 1
        if fetched > 1:
            await weights.release_hold(Version(0))
        return stored

    monkeypatch.setattr(weights, "_fetch", fetch)
    async with syncing(weights):
        weights.announce(Version(1))
        while not fetched:
            await asyncio.sleep(0)
        assert engine.events == ["pause"]
        await weights.release_hold(Version(0))
        await weights.wait_verified(Version(1))
        assert engine.events == ["pause", "pause", "pause", "load 1: 64 bytes", "resume", "score"]


async def test_a_pause_for_a_cut_waits_for_the_canary(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.scoring.clear()
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    async with syncing(weights):
        weights.announce(Version(1))
        while engine.events[-1:] != ["resume"]:
            await asyncio.sleep(0)

        async def pause() -> None:
            async with weights.paused_for_cut(Version(1)):
                assert weights.verified == 1

        pausing = asyncio.create_task(pause())
        await turns()
        assert engine.events[-1] == "resume"  # a paused engine could not score the canary
        engine.scoring.set()
        await pausing
        assert engine.events[-2:] == ["score", "pause"]


async def test_a_refused_version_never_pauses_for_a_cut(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.off = 0.15
    weights, _ = weight_sync(engine, store, tmp_path / "cache")
    weights.announce(Version(1))
    with pytest.raises(UserError):
        await weights.sync_loop()

    async def pause() -> None:
        async with weights.paused_for_cut(Version(1)):
            raise AssertionError("tokens of the refused version would be flushed")

    pausing = asyncio.create_task(pause())
    await turns()
    assert not pausing.done()
    assert engine.events[-1] == "pause", "the pause waits for the canary"
    pausing.cancel()


async def test_a_version_of_another_base_model_is_refused_before_it_reaches_the_engine(
    store: SnapshotClient, tmp_path: Path
) -> None:
    raw = np.zeros(64, dtype=np.uint8)
    stored, own = (Adapter(base, 4, 8.0, ("q_proj",)) for base in ("a" * 64, "b" * 64))
    store.put("test", Version(1), [RawTensor("w", "bfloat16", (4, 8), raw)], [CANARY], writer=1, adapter=stored)
    engine = Engine()
    weights = WeightSync(engine, store, tmp_path / "cache", tolerance=0.05, report=lambda _: None, adapter=own)  # type: ignore[arg-type]
    weights.announce(Version(1))
    with pytest.raises(UserError, match="version 1 belongs to another base model") as refused:
        await weights.sync_loop()
    assert refused.value.code == ExitCode.CONFIGURATION
    assert engine.events == []
