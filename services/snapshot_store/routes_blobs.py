"""The store's routes for content-addressed bodies.

PUT  /v1/objects/{blake3}       weights; 422 if the bytes do not match the digest, 507 quota_reached without room
GET  /v1/objects/{blake3}
PUT  /v1/claims/{blake3}        the body of a long log record, likewise; a repeated PUT resets its age
GET  /v1/claims/{blake3}

A GET answers 200 with the body, or 307 with a temporary address of the storage.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.openapi import bytes_content
from palimpsest.common.digests import HEX_DIGEST
from palimpsest.services.snapshot_store import instruments
from palimpsest.services.snapshot_store.bodies import WRITE_ERRORS
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.claim_check import ClaimCheckBlobs
from palimpsest.services.snapshot_store.quota import QuotaReached
from palimpsest.services.snapshot_store.storage import DigestMismatch, Storage

Digest = Annotated[str, Path(pattern=f"^{HEX_DIGEST}$")]


def routes(app: FastAPI, storage: Storage, catalog: Catalog, claims: ClaimCheckBlobs) -> None:
    """Add the routes."""

    sent = {"requestBody": {"required": True, "content": bytes_content()}}
    received: dict[int | str, dict[str, Any]] = {
        200: {"content": bytes_content()},
        307: {"description": "A temporary address of the storage, in `Location`"},
    }

    @app.put(
        "/v1/objects/{digest}",
        status_code=201,
        responses={**documented(411), **WRITE_ERRORS},
        openapi_extra=sent,
    )
    async def put_object(digest: Digest, request: Request) -> dict[str, int]:
        length = _length(request)
        if length is None and catalog.max_bytes is not None:
            raise HttpError(411, "length_required", "send Content-Length: the bytes of the store have a limit")
        try:
            size = await _receive(partial(catalog.put_object, size=length), digest, request)
        except QuotaReached:
            async for _ in request.stream():  # a sender that is not read to the end may not read the reply
                pass
            raise
        instruments.RECEIVED_BYTES.inc(size)
        return {"size": size}

    @app.get("/v1/objects/{digest}", response_class=Response, responses=received)
    async def get_object(digest: Digest) -> Response:
        missing = HttpError(404, "object_missing", f"no object {digest}")
        return await _send(storage, catalog.object_key(digest), missing)

    @app.put("/v1/claims/{digest}", status_code=201, responses=WRITE_ERRORS, openapi_extra=sent)
    async def put_claim(digest: Digest, request: Request) -> dict[str, int]:
        size = await _receive(claims.put, digest, request)
        instruments.CLAIM_BYTES.inc(size)
        return {"size": size}

    @app.get("/v1/claims/{digest}", response_class=Response, responses=received)
    async def get_claim(digest: Digest) -> Response:
        missing = HttpError(
            404, "claim_missing", f"no body {digest}: it was never sent, or was removed because of its age"
        )
        return await _send(storage, claims.key(digest), missing)


def _length(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() else None


async def _receive(put: Callable[[str, AsyncIterator[bytes]], Awaitable[int]], digest: str, request: Request) -> int:
    try:
        return await put(digest, request.stream())
    except DigestMismatch as mismatch:
        instruments.REFUSED.labels("digest_mismatch").inc()
        raise HttpError(422, "digest_mismatch", str(mismatch), retryable=True) from None


async def _send(storage: Storage, key: str, missing: HttpError) -> Response:
    if await storage.size(key) is None:
        raise missing
    if (address := await storage.address(key)) is not None:
        instruments.REDIRECTED.inc()
        return RedirectResponse(address, 307, {"Cache-Control": "no-store"})
    return StreamingResponse(_count_bytes(storage.stream(key)), media_type="application/octet-stream")


async def _count_bytes(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        instruments.SENT_BYTES.inc(len(chunk))
        yield chunk
