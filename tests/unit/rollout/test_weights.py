"""Updates in flight: the order of things, and what an unverified version may not do."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.service import Server
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
    """Records what is asked of it; scores the canary `off` nats too low."""

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


def the_weights(engine: Engine, store: SnapshotClient, folder: Path) -> tuple[WeightSync, list[UpdateResult]]:
    reports: list[UpdateResult] = []
    return WeightSync(engine, store, folder, tolerance=0.05, report=reports.append), reports  # type: ignore[arg-type]


async def test_a_version_is_fetched_loaded_and_verified_in_this_order(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 3)
    engine = Engine()
    weights, reports = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(3))
    await weights.wait_verified(Version(3))
    assert engine.events == ["pause", "load 3: 64 bytes", "resume", "score"]
    assert [(r.manifest.version, r.accepted, r.canary_error) for r in reports] == [(3, True, 0.0)]
    keeping.cancel()


async def test_nothing_is_trusted_before_the_canary_has_spoken(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.scoring.clear()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    waiting = asyncio.create_task(weights.wait_verified(Version(1)))
    while engine.events[-1:] != ["resume"]:
        await asyncio.sleep(0)
    assert not waiting.done()
    assert weights.verified == -1
    engine.scoring.set()
    await waiting
    assert weights.verified == 1
    keeping.cancel()


async def test_a_version_the_engine_does_not_compute_is_refused(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1, 2)
    engine = Engine()
    weights, reports = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    await weights.wait_verified(Version(1))
    engine.off = 0.15  # what a head left at the old weights was measured to do
    weights.announce(Version(2))
    with pytest.raises(UserError, match=r"refused version 2: canary error 0\.1500 nats exceeds") as refusal:
        await keeping
    assert refusal.value.code is ExitCode.CANARY
    assert [r.accepted for r in reports] == [True, False]
    assert weights.verified == 1


@pytest.mark.parametrize("off", [float("nan"), float("inf")])
async def test_a_canary_that_is_not_a_number_is_refused(store: SnapshotClient, tmp_path: Path, off: float) -> None:
    put(store, 1)
    engine = Engine()
    engine.off = off
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    weights.announce(Version(1))
    with pytest.raises(UserError, match="refused version 1"):
        await weights.sync_loop()


async def test_only_the_newest_of_several_is_applied(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1, 2, 3)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    for version in (1, 2, 3, 2):
        weights.announce(Version(version))
    keeping = asyncio.create_task(weights.sync_loop())
    await weights.wait_verified(Version(3))
    assert engine.events == ["pause", "load 3: 64 bytes", "resume", "score"]
    keeping.cancel()


async def test_a_version_swept_in_the_meantime_is_skipped(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 2)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    while weights._announced.is_set():
        await asyncio.sleep(0)
    weights.announce(Version(2))
    await weights.wait_verified(Version(2))
    assert engine.events == ["pause", "load 2: 64 bytes", "resume", "score"]
    keeping.cancel()


@pytest.mark.parametrize("damage", ["truncate", "flip"])
async def test_damaged_weights_never_reach_the_engine(store: SnapshotClient, tmp_path: Path, damage: str) -> None:
    put(store, 1)
    held = tmp_path / "store" / "objects" / store.manifest(Version(1)).object
    body = bytearray(held.read_bytes())
    if damage == "flip":
        body[-1] ^= 0xFF
    held.write_bytes(body[:-3] if damage == "truncate" else body)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    weights.announce(Version(1))
    with pytest.raises(UserError, match="returned damaged weights: version 1") as refusal:
        await weights.sync_loop()
    assert refusal.value.code is ExitCode.DAMAGED
    assert engine.events == []
    assert list((tmp_path / "cache").iterdir()) == []


async def test_files_of_an_earlier_process_are_removed_and_none_are_left(store: SnapshotClient, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "7.raw").write_bytes(b"left")
    put(store, 1)
    weights, _ = the_weights(Engine(), store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    await weights.wait_verified(Version(1))
    await asyncio.sleep(0)
    assert list((tmp_path / "cache").iterdir()) == []
    keeping.cancel()


async def test_while_a_version_is_held_neither_it_nor_an_older_one_is_loaded(
    store: SnapshotClient, tmp_path: Path
) -> None:
    put(store, 1, 2, 3)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    await weights.wait_verified(Version(1))
    engine.events.clear()
    async with weights.paused_for_cut(Version(2)):
        assert engine.events == ["pause"]
        weights.announce(Version(2))
    while weights._announced.is_set():
        await asyncio.sleep(0)
    weights.announce(Version(3))
    await weights.wait_verified(Version(3))
    assert engine.events == ["pause", "pause", "load 3: 64 bytes", "resume", "score"]
    keeping.cancel()


async def test_a_version_that_was_fetched_when_it_is_held_is_not_loaded_before_it_may_be_sampled_with(
    store: SnapshotClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
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
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    while not fetched:
        await asyncio.sleep(0)
    assert engine.events == ["pause"]
    await weights.release_hold(Version(0))
    await weights.wait_verified(Version(1))
    assert engine.events == ["pause", "pause", "pause", "load 1: 64 bytes", "resume", "score"]
    keeping.cancel()


async def test_letting_go_of_a_version_lets_the_engine_go_on_with_it_but_not_with_an_older_one(
    store: SnapshotClient, tmp_path: Path
) -> None:
    put(store, 1, 2)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    await weights.wait_verified(Version(1))
    engine.events.clear()
    async with weights.paused_for_cut(Version(1)):
        pass
    await weights.release_hold(Version(1))
    assert engine.events == ["pause"]
    await weights.release_hold(Version(0))
    assert engine.events == ["pause", "resume"]
    async with weights.paused_for_cut(Version(2)):
        pass
    await weights.release_hold(Version(1))
    assert engine.events == ["pause", "resume", "pause"]  # what it has is version 1
    weights.announce(Version(2))
    await weights.wait_verified(Version(2))
    assert engine.events[3:] == ["pause", "load 2: 64 bytes", "resume", "score"]
    keeping.cancel()


async def test_an_engine_that_is_ahead_of_the_held_version_goes_on_at_once(
    store: SnapshotClient, tmp_path: Path
) -> None:
    put(store, 2)
    engine = Engine()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(2))
    await weights.wait_verified(Version(2))
    engine.events.clear()
    async with weights.paused_for_cut(Version(1)):
        assert engine.events == ["pause"]
    assert engine.events == ["pause", "resume"]
    keeping.cancel()


async def test_standing_still_waits_for_the_verdict(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.scoring.clear()
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    keeping = asyncio.create_task(weights.sync_loop())
    weights.announce(Version(1))
    while engine.events[-1:] != ["resume"]:
        await asyncio.sleep(0)

    async def stand_still() -> None:
        async with weights.paused_for_cut(Version(1)):
            assert weights.verified == 1

    standing = asyncio.create_task(stand_still())
    await turns()
    assert engine.events[-1] == "resume"  # paused now, it could not be scored
    engine.scoring.set()
    await standing
    assert engine.events[-2:] == ["score", "pause"]
    keeping.cancel()


async def test_after_a_refusal_nobody_finds_the_engine_standing_still(store: SnapshotClient, tmp_path: Path) -> None:
    put(store, 1)
    engine = Engine()
    engine.off = 0.15
    weights, _ = the_weights(engine, store, tmp_path / "cache")
    weights.announce(Version(1))
    with pytest.raises(UserError):
        await weights.sync_loop()

    async def stand_still() -> None:
        async with weights.paused_for_cut(Version(1)):
            raise AssertionError("what the refused version said would be sent ahead")

    standing = asyncio.create_task(stand_still())
    await turns()
    assert not standing.done()
    assert engine.events[-1] == "pause", "it came as far as to wait for the verdict"
    standing.cancel()
