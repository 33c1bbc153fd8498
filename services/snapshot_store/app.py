"""The store over HTTP.

PUT  /v1/versions/{number}      a sealed manifest: 201 new, 200 repeated, 409 other weights or a replaced writer,
                                424 an object is missing, or a delta to a version that is not there
GET  /v1/versions/{number}
GET  /v1/versions
PUT  /v1/leases/{holder}        {"lowest": version}; the lease expires unless it is repeated
DELETE /v1/leases/{holder}      204, 404 no such lease
and /v1/objects, /v1/claims: see routes_blobs.py; /v1/writers, /v1/checkpoints: see routes_writers.py;
/v1/members: see routes_members.py; /v1/pins: see routes_pins.py; /v1/quota: see routes_quota.py

Every route answers 503 storage_unavailable while the storage does not answer; writes answer 507 disk_full while it is
full, and 507 quota_reached if the weights have no room below the limit.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import msgspec
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse

from palimpsest.common.bus.claim_check import MOST_CLAIM_BYTES
from palimpsest.common.control import log_level
from palimpsest.common.control.access import Access
from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.openapi import json_body, json_content
from palimpsest.common.files import FULL
from palimpsest.common.logs import logger
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Status, application
from palimpsest.common.snapshots.manifest import Damaged, SealedManifest, unseal
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store import (
    instruments,
    routes_blobs,
    routes_members,
    routes_pins,
    routes_quota,
    routes_writers,
)
from palimpsest.services.snapshot_store.bodies import MOST, WRITE_ERRORS, WRITER_ERRORS, Number, decoded
from palimpsest.services.snapshot_store.catalog import Catalog, Conflict, UnknownParent
from palimpsest.services.snapshot_store.claim_check import ClaimCheckBlobs
from palimpsest.services.snapshot_store.kept_members import KeptMembers
from palimpsest.services.snapshot_store.rebase import Rebaser
from palimpsest.services.snapshot_store.storage import Storage, Unavailable

LeaseHolder = Annotated[str, Path(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
CLAIMS_KEEP_S = 192 * 3600.0
BODY_LIMITS = {"/v1/objects/": None, "/v1/claims/": MOST_CLAIM_BYTES, "/v1/versions/": 32 * 2**20}
"""Maximum size of the bodies of a route in bytes; None: weights, of any size."""
CLAIM_LOOKS = 100
"""Number of sweeps of old claims during the time for which they are kept."""


class LeaseRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PUT /v1/leases/{holder}."""

    lowest: Annotated[int, msgspec.Meta(ge=0, le=MOST)]


async def open_catalog(storage: Storage) -> Catalog:
    """Open the catalog of this storage. Raises UserError if a file is damaged or cannot be read."""
    catalog = Catalog(storage)
    try:
        await catalog.open()
        await KeptMembers(storage).open()
    except Damaged as damage:
        raise UserError(
            f"the snapshot store's folder is damaged: {damage}. Restore that file from a backup, or remove it: "
            f"a version is lost without its manifest, all leases without leases.json, the names in use without "
            f"members.json",
            ExitCode.DAMAGED,
        ) from None
    except Unavailable as error:
        raise UserError(
            f"the snapshot store's storage cannot be read: {error}; start the store again when it answers",
            ExitCode.UNAVAILABLE,
        ) from None
    return catalog


def create_app(
    storage: Storage,
    *,
    sweep_s: float,
    claims_keep_s: float = CLAIMS_KEEP_S,
    max_bytes: int | None = None,
    compression: int = 3,
    access: Access | None = None,
) -> FastAPI:
    """Return the store's application. It reads the catalog at the start and sweeps while it runs.

    max_bytes: limit on the bytes of weights; None: no limit. compression: zstd level of weights that the store itself
    stores in full.
    """
    catalog = Catalog(storage, max_bytes=max_bytes)
    claims, members = ClaimCheckBlobs(storage), KeptMembers(storage)
    instruments.QUOTA_BYTES.set(max_bytes or 0)
    state = {"open": False}

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await catalog.open()
        await members.open()
        state["open"] = True
        _observe(catalog)
        rebaser = Rebaser(catalog, storage, level=compression)
        sweeping = asyncio.create_task(_sweep(catalog, claims, rebaser, sweep_s, claims_keep_s))
        yield
        sweeping.cancel()
        with suppress(asyncio.CancelledError):
            await sweeping

    def status() -> Status:
        versions = list(catalog.versions)
        return {
            "versions": len(versions),
            "oldest": versions[0] if versions else None,
            "newest": versions[-1] if versions else None,
            "bytes": sum(m.object_size for m in catalog.versions.values()),
            "leases": catalog.leases,
            "quota": routes_quota.state(catalog),
        }

    app = application(
        "snapshot_store",
        registry=REGISTRY,
        ready=lambda: None if state["open"] else "the catalog",
        status=status,
        lifespan=lifespan,
        access=access,
        body_limits=BODY_LIMITS,
        rules=(*routes_pins.RULES, *log_level.RULES),
    )
    routes_blobs.routes(app, storage, catalog, claims)
    _versions(app, catalog)
    _leases(app, catalog)
    routes_writers.routes(app, catalog.writers)
    routes_members.routes(app, members)
    routes_pins.routes(app, catalog)
    app.include_router(log_level.level_routes())
    routes_quota.routes(app, catalog)

    @app.exception_handler(Unavailable)
    async def unavailable(_request: Request, error: Unavailable) -> JSONResponse:
        instruments.STORAGE_FAILURES.inc()
        body = {"code": "storage_unavailable", "message": str(error), "retryable": True}
        if error.address:
            body["address"] = error.address
        return JSONResponse(body, 503, {"Retry-After": "1"})

    @app.exception_handler(OSError)
    async def full(_request: Request, error: OSError) -> JSONResponse:
        if error.errno not in FULL:
            raise error
        message = f"the disk of the snapshot store is full (writing {error.filename}): free some"
        where = {"errno": error.errno, "path": error.filename}
        return JSONResponse({"code": "disk_full", "message": message, "retryable": True, **where}, 507)

    return app


def _versions(app: FastAPI, catalog: Catalog) -> None:
    @app.put(
        "/v1/versions/{number}",
        response_class=Response,
        responses={201: {"description": "New"}, **documented(424), **WRITE_ERRORS, **WRITER_ERRORS},
        openapi_extra=json_body(app, SealedManifest),
    )
    async def put_version(number: Number, request: Request) -> Response:
        body = await request.body()
        try:
            manifest = unseal(body)
        except Damaged as damage:
            instruments.REFUSED.labels("damaged_manifest").inc()
            raise HttpError(422, "damaged_manifest", str(damage)) from None
        if manifest.version != number:
            raise HttpError(422, "other_version", f"the manifest belongs to version {manifest.version}, not {number}")
        try:
            with routes_writers.writer_errors_as_conflict():
                new = await catalog.put_version(manifest, body)
        except Conflict as conflict:
            instruments.REFUSED.labels("version_conflict").inc()
            raise HttpError(409, "version_conflict", str(conflict)) from None
        except UnknownParent as error:
            instruments.REFUSED.labels("parent_missing").inc()
            raise HttpError(424, "parent_missing", str(error)) from None
        except KeyError as missing:
            instruments.REFUSED.labels("object_missing").inc()
            raise HttpError(
                424,
                "object_missing",
                f"object {missing.args[0]} is missing or incomplete: send it first",
                retryable=True,
            ) from None
        _observe(catalog)
        return Response(status_code=201 if new else 200)

    @app.get(
        "/v1/versions/{number}",
        response_class=Response,
        responses={200: {"content": json_content(app, SealedManifest)}},
    )
    async def get_version(number: Number) -> Response:
        body = await catalog.body(Version(number))
        if body is None:
            raise HttpError(404, "version_missing", f"no version {number}")
        return Response(body, media_type="application/json")

    @app.get("/v1/versions")
    async def list_versions() -> dict[str, list[dict[str, int | str]]]:
        return {"versions": [{"version": v, "digest": m.digest} for v, m in catalog.versions.items()]}


def _leases(app: FastAPI, catalog: Catalog) -> None:
    @app.put("/v1/leases/{holder}", responses=WRITE_ERRORS, openapi_extra=json_body(app, LeaseRequest))
    async def put_lease(holder: LeaseHolder, request: Request) -> dict[str, int]:
        lease = await decoded(request, LeaseRequest, "bad_lease")
        await catalog.lease(holder, Version(lease.lowest))
        instruments.OLDEST_NEEDED.set(min(catalog.leases.values()))
        return {"lowest": lease.lowest}

    @app.delete("/v1/leases/{holder}", status_code=204, responses=WRITE_ERRORS)
    async def delete_lease(holder: LeaseHolder) -> None:
        if not await catalog.release(holder):
            raise HttpError(404, "lease_missing", f"{holder} has no lease")
        instruments.OLDEST_NEEDED.set(min(catalog.leases.values(), default=0))


async def _sweep(
    catalog: Catalog, claims: ClaimCheckBlobs, rebaser: Rebaser, every_s: float, claims_keep_s: float
) -> None:
    look = 0.0
    while True:
        await asyncio.sleep(every_s)
        try:
            gone = await catalog.sweep()
            if await rebaser.relieve() is not None:
                instruments.REBASED.inc()
                gone += await catalog.sweep()
            if gone:
                instruments.SWEPT_VERSIONS.inc(len(gone))
                logger().debug("swept", versions=gone)
            _observe(catalog)
            if time.monotonic() >= look:
                look = time.monotonic() + claims_keep_s / CLAIM_LOOKS
                instruments.SWEPT_CLAIMS.inc(await claims.sweep(claims_keep_s))
        except Unavailable as error:
            logger().warning("not swept", reason=str(error))  # the next sweep removes them
        except OSError as error:
            if error.errno not in FULL:
                raise
            logger().warning("chain not replaced", reason=str(error))


def _observe(catalog: Catalog) -> None:
    manifests = catalog.versions.values()
    instruments.VERSIONS.set(len(manifests))
    instruments.STORED_BYTES.set(sum(manifest.object_size for manifest in manifests))
    instruments.USED_BYTES.set(catalog.used_bytes)
