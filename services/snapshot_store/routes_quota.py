"""The store's route for its limit on bytes.

GET  /v1/quota    ?bytes=number: make room for an object of this many bytes; 507 quota_reached if there is none

The limit, the bytes in use, and what each lease and each pin holds. A client whose upload was refused asks here until
there is room, and then sends the bytes again.
"""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from palimpsest.services.snapshot_store import instruments
from palimpsest.services.snapshot_store.bodies import MOST, WRITE_ERRORS
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.quota import QuotaReached

NAMED = 20
"""Holders in a reply."""


def routes(app: FastAPI, catalog: Catalog) -> None:
    """Add the route and the reply to an upload without room."""

    @app.get("/v1/quota", responses=WRITE_ERRORS)
    async def get_quota(size: Annotated[int, Query(alias="bytes", ge=0, le=MOST)] = 0) -> dict[str, Any]:
        if size:
            await catalog.make_room(size)
        return state(catalog)

    @app.exception_handler(QuotaReached)
    async def refused(_request: Request, error: QuotaReached) -> JSONResponse:
        instruments.REFUSED.labels("quota_reached").inc()
        body = {"code": "quota_reached", "message": str(error), "retryable": True}
        return JSONResponse(body, 507, {"Retry-After": "5"})


def state(catalog: Catalog) -> dict[str, Any]:
    """Return the limit, the use, and the largest holders."""
    return {
        "max_bytes": catalog.max_bytes,
        "used_bytes": catalog.used_bytes,
        "held": [
            {"by": each.who, "versions": each.versions, "bytes": each.bytes, "alone": each.freed}
            for each in catalog.holdings()[:NAMED]
        ],
    }
