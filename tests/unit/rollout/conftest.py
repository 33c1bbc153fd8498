"""Services around a worker: a store with versions 0 to 3, a gateway with the built-in environments, and a log."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from palimpsest.common.service import Server
from palimpsest.common.sessions import registry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.versions import Version
from palimpsest.services.env_gateway.app import create_app as create_gateway
from palimpsest.services.rollout import worker
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.snapshot_store.app import create_app as create_store
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.rollout.sampling import Setting
from tests.unit.rollout.working import CANARY, RUN, Place, opened_bus


@pytest.fixture(scope="session")
def dialogue(starting_model: Path) -> ChatRenderer:
    return ChatRenderer.load(str(starting_model), {})


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SnapshotClient]:
    app = create_store(DiskStorage(tmp_path_factory.mktemp("store")), sweep_s=3600)
    with (
        Server(app, "127.0.0.1", 0, key="snapshot_store") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}", sleep=lambda _: None) as client,
    ):
        Writer(client).begin()
        for version in range(4):
            raw = np.full(64, version, dtype=np.uint8)
            client.put(RUN, Version(version), [RawTensor("w", "bfloat16", (4, 8), raw)], [CANARY], writer=1)
        yield client


@pytest.fixture(scope="session")
def gateway() -> Iterator[str]:
    offered = registry.built_in()
    limits = SessionLimits(max_sessions=1000, lease_s=600.0, remember_s=600.0, result_bytes=65536)
    app = create_gateway(Sessions(offered, limits), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def place(
    tmp_path: Path, versions: SnapshotClient, gateway: str, dialogue: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    for pause in ("POLL_S", "KEEP_S"):  # tests wait for conditions, not for these pauses
        monkeypatch.setattr(worker, pause, 0.01)
    with closing(opened_bus(tmp_path / "bus.sqlite")) as bus:
        yield Place(tmp_path, bus, versions, gateway, dialogue)


@pytest.fixture
def setting(gateway: str, dialogue: ChatRenderer) -> Setting:
    return Setting(gateway, dialogue)
