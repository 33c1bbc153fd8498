"""The HTTP application of every service, as its program builds it."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from palimpsest.common.control.access import Access
from palimpsest.common.service import Starting
from palimpsest.services.env_gateway import registry
from palimpsest.services.env_gateway.app import create_app as create_gateway
from palimpsest.services.env_gateway.sessions import SessionLimits, Sessions
from palimpsest.services.snapshot_store.app import create_app as create_store
from palimpsest.services.snapshot_store.storage_disk import DiskStorage

LIMITS = SessionLimits(max_sessions=100, lease_s=600.0, remember_s=600.0, result_bytes=1000)


def _starting(name: str) -> Callable[[Access | None, Path], FastAPI]:
    """The application of a service that is built on Starting."""

    def create(access: Access | None, _folder: Path) -> FastAPI:
        server = Starting(name, "127.0.0.1", 0, key=name, registry=CollectorRegistry(), access=access)
        with server:
            server.show_service(ready=lambda: None, status=dict)
        return server.app

    return create


def _store(access: Access | None, folder: Path) -> FastAPI:
    return create_store(DiskStorage(folder, tidy=False), sweep_s=3600, access=access)


def _gateway(access: Access | None, _folder: Path) -> FastAPI:
    offered = registry.built_in()
    return create_gateway(Sessions(offered, LIMITS), offered, access=access)


APPS: dict[str, Callable[[Access | None, Path], FastAPI]] = {
    "store": _store,
    "gateway": _gateway,
    "learner": _starting("learner"),
    "rollout": _starting("rollout"),
    "replica": _starting("replica"),
}
