"""The HTTP application of every service, as its program builds it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control import drain
from palimpsest.common.control.access import Access
from palimpsest.common.control.changes import ChangeState
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.page.points import VersionPoint, point
from palimpsest.common.service import Starting
from palimpsest.common.sessions import registry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.services.env_gateway.app import create_app as create_gateway
from palimpsest.services.learner.control.page_routes import PAGE_RULES, page_routes
from palimpsest.services.learner.control.routes import RULES, control_routes
from palimpsest.services.learner.control.run_control import CurrentSettings
from palimpsest.services.learner.control.waits import Wait, waits
from palimpsest.services.snapshot_store.app import create_app as create_store
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.records.batches import write_batch
from tests.records.history_lines import a_line

LIMITS = SessionLimits(max_sessions=100, lease_s=600.0, remember_s=600.0, result_bytes=1000)


def _starting(name: str, **options: Any) -> Callable[[Access | None, Path], FastAPI]:
    """The application of a service that is built on Starting. options: see `show_service`."""

    def create(access: Access | None, _folder: Path) -> FastAPI:
        server = Starting(name, "127.0.0.1", 0, key=name, registry=CollectorRegistry(), access=access)
        with server:
            server.show_service(ready=lambda: None, status=dict, **options)
        return server.app

    return create


def _learner(access: Access | None, folder: Path) -> FastAPI:
    """A learner whose loop finishes every change at once and applies none. It has a recorded batch of version 3."""
    desk = ControlDesk("change-")
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 3}}
    )

    def finish_changes() -> None:
        while True:
            for change in desk.take():
                desk.finish(change, ChangeState.APPLIED, version=1)
            time.sleep(0.01)

    threading.Thread(target=finish_changes, daemon=True).start()
    routes = control_routes(desk, lambda: CurrentSettings(config), cuts=True)
    routes.include_router(
        page_routes(waits=_waits, points=_points, folder=folder / "records", decode=lambda token: f"<{token}>")
    )
    if folder != Path():
        write_batch(folder / "records", now=3)
    server = Starting("learner", "127.0.0.1", 0, key="learner", registry=CollectorRegistry(), access=access)
    with server:
        server.show_service(
            ready=lambda: None,
            status=dict,
            routes=routes,
            rules=(*RULES, *PAGE_RULES),
        )
    return server.app


def _waits() -> list[Wait]:
    return waits(
        waiting_for="trajectories: 1 of 4 groups are complete",
        waited_s=3.0,
        status={"oldest_group": "g000001", "oldest_group_s": 9.0},
        workers={},
        outages=(),
        now=0.0,
        unix_now=0.0,
    )


def _points(after: int) -> list[VersionPoint]:
    return [one for one in map(point, (a_line(version) for version in range(4))) if one.version > after]


def _store(access: Access | None, folder: Path) -> FastAPI:
    return create_store(DiskStorage(folder, tidy=False), sweep_s=3600, access=access)


def _gateway(access: Access | None, _folder: Path) -> FastAPI:
    offered = registry.built_in()
    return create_gateway(Sessions(offered, LIMITS), offered, access=access)


APPS: dict[str, Callable[[Access | None, Path], FastAPI]] = {
    "store": _store,
    "gateway": _gateway,
    "learner": _learner,
    "rollout": _starting("rollout", routes=drain.drain_routes(lambda: None, lambda: 0), rules=drain.RULES),
    "replica": _starting("replica"),
}
