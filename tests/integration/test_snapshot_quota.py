"""A store at its limit of bytes, a chain with two writers, and a lease that ends while a reader reads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.outages import ROOM, Outages
from palimpsest.common.service import Server, Stop
from palimpsest.common.snapshots import client as clients, retrying_http
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ParentMissing, ParentWeights, SnapshotClient, VersionConflict
from palimpsest.common.snapshots.fencing import Fenced
from palimpsest.common.snapshots.manifest import Manifest, Parent
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.retrying_http import RetryingHttp, StoreUnavailable
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.__main__ import wait_for_room
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.catalog import LEASE_S, Catalog
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.servers.stored_weights import RawTensor, a_tensor

pytestmark = pytest.mark.servers
NUMBERS = 50_000


@contextmanager
def store(folder: Path, *, max_bytes: int | None = None, sweep_s: float = 3600) -> Iterator[str]:
    app = create_app(DiskStorage(folder), sweep_s=sweep_s, max_bytes=max_bytes)
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as server:
        yield f"http://127.0.0.1:{server.port}"


def weights(seed: int) -> list[RawTensor]:
    return [a_tensor("w", "bfloat16", (NUMBERS,), seed)]


def put(client: SnapshotClient, version: int, writer: int, seed: int | None = None) -> Manifest:
    seed = version if seed is None else seed
    return client.put("t", Version(version), weights(seed), (), writer=writer)


def moved(tensors: list[RawTensor], seed: int) -> list[RawTensor]:
    """The weights after a small step."""
    raw = tensors[0].raw.copy().view(np.uint16)
    raw[np.random.default_rng(seed).random(NUMBERS) < 0.01] += 1
    return [RawTensor("w", "bfloat16", (NUMBERS,), raw.view(np.uint8))]


def as_parent(manifest: Manifest, tensors: list[RawTensor]) -> ParentWeights:
    cost = ChainCost(2 * NUMBERS)
    return ParentWeights(Parent(manifest.version, manifest.digest), {"w": tensors[0].raw}, cost)


def test_a_learner_waits_for_room_and_goes_on_when_a_pin_is_released(tmp_path: Path) -> None:
    with store(tmp_path, max_bytes=int(5.5 * NUMBERS)) as url, SnapshotClient(url) as client:
        (writer := Writer(client)).begin()
        put(client, 0, writer.epoch)
        client.request("PUT", "/v1/pins/0", {"name": "best"})
        put(client, 1, writer.epoch)
        client.lease("learner", Version(1))
        outages, pauses = Outages(), []

        def pause(_seconds: float) -> None:
            pauses.append(outages.ongoing())
            if len(pauses) == 2:
                with SnapshotClient(url) as person:
                    person._calls.call(lambda http: http.delete("/v1/pins/0", params={"name": "best"}))

        with SnapshotClient(url, sleep_without_room=pause) as waiting:
            waiting._calls._outages = outages
            assert put(waiting, 2, writer.epoch).version == 2
        (outage,) = pauses[0]
        assert outage["of"] == ROOM
        assert "palimpsest pin RUN 0 --name=best --release" in outage["problem"]
        assert outages.ongoing() == []
        assert client.versions() == [1, 2]


def test_a_stop_ends_the_wait_for_room(tmp_path: Path) -> None:
    stop = Stop()
    with store(tmp_path, max_bytes=3 * NUMBERS) as url, SnapshotClient(url) as client:
        (writer := Writer(client)).begin()
        put(client, 0, writer.epoch)
        with SnapshotClient(url, sleep_without_room=lambda seconds: wait_for_room(stop, seconds)) as waiting:
            threading.Timer(0.05, lambda: stop.request(ExitCode.STOPPED)).start()
            with pytest.raises(UserError, match="no room") as caught:
                put(waiting, 1, writer.epoch)
        assert caught.value.code is ExitCode.STOPPED


def test_the_wait_for_room_ends_before_the_lease_of_the_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert retrying_http.ROOM_PATIENCE_S < LEASE_S
    monkeypatch.setattr(retrying_http, "ROOM_PATIENCE_S", 20.0)
    with store(tmp_path, max_bytes=10) as url:
        calls = RetryingHttp(url, patience_s=1, sleep=lambda _: None)
        with pytest.raises(StoreUnavailable, match=r"They never fit: raise snapshot_store\.max_gib"):
            calls.wait_for_room(100)
        calls.close()


@pytest.fixture
def chained(tmp_path: Path) -> Iterator[tuple[SnapshotClient, Writer, Manifest]]:
    """A store with version 0, and its writer."""
    with store(tmp_path) as url, SnapshotClient(url) as client:
        (writer := Writer(client)).begin()
        yield client, writer, put(client, 0, writer.epoch)


def test_of_two_writers_on_one_chain_only_the_newest_extends_it(
    chained: tuple[SnapshotClient, Writer, Manifest], tmp_path: Path
) -> None:
    client, old, base = chained
    (new := Writer(client)).begin()
    ours, theirs = moved(weights(0), 1), moved(weights(0), 2)
    parent = as_parent(base, weights(0))
    with pytest.raises(Fenced):
        client.put("t", Version(1), theirs, (), writer=old.epoch, parent=parent)
    client.put("t", Version(1), ours, (), writer=new.epoch, parent=parent)
    with pytest.raises(VersionConflict):  # a successor that has trained version 1 otherwise takes the next number
        client.put("t", Version(1), theirs, (), writer=new.epoch, parent=parent)
    stale = as_parent(client.manifest(Version(1)), theirs)
    with pytest.raises(ParentMissing):  # a delta to weights that were never stored
        client.put(
            "t", Version(2), ours, (), writer=new.epoch,
            parent=ParentWeights(Parent(Version(1), "0" * 64), stale.raw, stale.cost),
        )  # fmt: skip
    walker = Walker(client, raw := RawFile(tmp_path / "copy"))
    walker.move(Version(1))
    assert walker.manifest is not None
    assert [tensor.raw.tobytes() for tensor in raw.tensors(walker.manifest)] == [ours[0].raw.tobytes()]


def test_without_the_check_of_epochs_the_old_writer_would_extend_the_chain(
    chained: tuple[SnapshotClient, Writer, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, old, base = chained
    Writer(client).begin()

    async def unchecked(*_: object) -> None:
        return None

    monkeypatch.setattr("palimpsest.services.snapshot_store.writers.Writers.check", unchecked)
    manifest = client.put(
        "t", Version(1), moved(weights(0), 2), (), writer=old.epoch, parent=as_parent(base, weights(0))
    )
    assert manifest.parent is not None


def test_a_lease_that_ends_while_a_reader_walks_serves_no_wrong_weights(tmp_path: Path) -> None:
    """The reader's chain is removed under it: VersionMissing; then it reads the version that stays."""
    with store(tmp_path / "store", sweep_s=0.02) as url, SnapshotClient(url) as client:
        (writer := Writer(client)).begin()
        client.lease("learner", Version(0))
        tensors, manifest = weights(0), put(client, 0, writer.epoch)
        for version in range(1, 4):
            parent = as_parent(manifest, tensors)
            tensors = moved(tensors, version)
            manifest = client.put("t", Version(version), tensors, (), writer=writer.epoch, parent=parent)
            assert manifest.parent is not None
        put(client, 4, writer.epoch)
        walker = Walker(Ending(client), raw := RawFile(tmp_path / "copy"))
        with pytest.raises(clients.VersionMissing):
            walker.move(Version(3))
        assert walker.manifest is None  # of no version: the next move loads a base
        walker.move(Version(4))
        assert walker.manifest is not None
        assert [tensor.raw.tobytes() for tensor in raw.tensors(walker.manifest)] == [weights(4)[0].raw.tobytes()]


class Ending:
    """A source whose lease ends while the reader reads the object of the base."""

    def __init__(self, client: SnapshotClient) -> None:
        self._client, self.manifest, self._ended = client, client.manifest, False

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        with self._client.object(manifest) as pieces:
            yield pieces
        if not self._ended:
            self._ended = True
            self._client.lease("learner", Version(4))
            while self._client.versions() != [4]:  # until the sweep
                threading.Event().wait(0.01)


async def test_without_the_rule_about_ancestors_a_leased_delta_loses_its_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store(tmp_path) as url, SnapshotClient(url) as client:
        (writer := Writer(client)).begin()
        base = put(client, 0, writer.epoch)
        client.put("t", Version(1), moved(weights(0), 1), (), writer=writer.epoch, parent=as_parent(base, weights(0)))
        client.lease("learner", Version(1))
    monkeypatch.setattr("palimpsest.services.snapshot_store.retention.ancestors", lambda *_: set())
    catalog = Catalog(DiskStorage(tmp_path))
    await catalog.open()
    assert await catalog.sweep() == [0]
