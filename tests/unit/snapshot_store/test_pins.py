"""Pins keep versions; over HTTP they need the role `operate`."""

from pathlib import Path

import httpx
import pytest

from palimpsest.common.control.access import Role, needed_roles
from palimpsest.common.snapshots.manifest import Damaged
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.pins import KEY, Pins, TooManyPins
from palimpsest.services.snapshot_store.routes_pins import RULES
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.unit.snapshot_store.catalogs import Clock, opened, put


async def test_a_pinned_version_stays_until_it_is_released(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    for version in range(3):
        await put(catalog, version)
    await catalog.pin(Version(0), "best", seconds=None)
    await catalog.lease("learner", Version(2))
    assert await catalog.sweep() == [1]
    assert (await opened(tmp_path)).pins.all() == {0: {"best": None}}
    assert await catalog.unpin(Version(0), "best")
    assert not await catalog.unpin(Version(0), "best")
    assert await catalog.sweep() == [0]


async def test_a_version_that_is_not_there_cannot_be_pinned(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    with pytest.raises(KeyError):
        await catalog.pin(Version(5), "best", seconds=None)


async def test_a_pin_expires_by_the_wall_clock(tmp_path: Path) -> None:
    clock = Clock()
    pins = Pins(DiskStorage(tmp_path), clock=clock)
    assert await pins.pin(Version(1), "a", seconds=10) == 10
    await pins.pin(Version(1), "b", seconds=None)
    clock.now = 11
    again = Pins(DiskStorage(tmp_path), clock=clock)
    await again.open()
    assert again.all() == {1: {"b": None}}


async def test_the_number_of_pins_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.services.snapshot_store.pins.MOST", 2)
    pins = Pins(DiskStorage(tmp_path))
    await pins.pin(Version(1), "a", seconds=None)
    await pins.pin(Version(2), "a", seconds=None)
    await pins.pin(Version(2), "a", seconds=5)  # renewed
    with pytest.raises(TooManyPins):
        await pins.pin(Version(3), "a", seconds=None)


async def test_damaged_pins_are_refused(tmp_path: Path) -> None:
    (tmp_path / KEY).write_bytes(b"[]")
    with pytest.raises(Damaged, match=r"pins\.json"):
        await opened(tmp_path)


async def test_the_routes_pin_list_and_release(tmp_path: Path) -> None:
    await put(await opened(tmp_path), 3)
    app = create_app(DiskStorage(tmp_path), sweep_s=3600)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        reply = await client.put("/v1/pins/3", json={"name": "best"})
        assert (reply.status_code, reply.json()) == (200, {"version": 3, "name": "best", "until": None})
        assert (await client.get("/v1/pins")).json() == {"pins": {"3": {"best": None}}}
        assert (await client.put("/v1/pins/4", json={"name": "best"})).json()["code"] == "version_missing"
        for body in ({"name": ""}, {"name": "a/b"}, {"name": "a\n"}, {"name": "a", "seconds": -1}, {"more": 1}):
            assert (await client.put("/v1/pins/3", json=body)).json()["code"] == "bad_pin"
        assert (await client.delete("/v1/pins/3?name=best")).status_code == 200
        assert (await client.delete("/v1/pins/3?name=best")).json()["code"] == "pin_missing"


@pytest.mark.parametrize(
    ("method", "path", "roles"),
    [
        ("PUT", "/v1/pins/3", {Role.OPERATE, Role.SERVICE}),
        ("DELETE", "/v1/pins/3", {Role.OPERATE, Role.SERVICE}),
        ("GET", "/v1/pins", {Role.VIEW}),
    ],
)
def test_pins_are_for_people_and_the_learner(method: str, path: str, roles: set[Role]) -> None:
    assert set(needed_roles(method, path, RULES)) == roles
