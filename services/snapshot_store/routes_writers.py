"""The store's routes for writers and checkpoints.

POST   /v1/writers                           {"holder": name}: a new epoch; earlier writers are refused from now on
GET    /v1/writers                           the newest writer; nulls before the first one
GET    /v1/writers/{epoch}                   200 while it is the newest, 409 fenced, 409 writer_unknown
PUT    /v1/checkpoints/{version}/{writer}    {"digest": blake3}: accept it; 201 new, 200 repeated, 409 as above, other
DELETE /v1/checkpoints/{version}/{writer}    ?by=epoch: withdraw it; 409 as above for `by`
GET    /v1/checkpoints                       the accepted checkpoints, oldest first
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.openapi import json_body
from palimpsest.common.digests import HEX_DIGEST
from palimpsest.common.logs import logger
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store import instruments
from palimpsest.services.snapshot_store.bodies import MOST, WRITE_ERRORS, WRITER_ERRORS, Number, decoded
from palimpsest.services.snapshot_store.writers import CommitConflict, StaleWriter, UnknownWriter, Writers


class CheckpointId(BaseModel):
    """Reply of the routes that accept or withdraw a checkpoint."""

    version: int
    writer: int


class Holder(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/writers."""

    holder: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Commit(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PUT /v1/checkpoints/{version}/{writer}."""

    digest: Annotated[str, msgspec.Meta(pattern=rf"^{HEX_DIGEST}\Z", extra_json_schema={"pattern": f"^{HEX_DIGEST}$"})]


@contextmanager
def writer_errors_as_conflict() -> Iterator[None]:
    """Convert the errors about writers in the block to 409."""
    try:
        yield
    except StaleWriter as error:
        raise _conflict("fenced", error) from None
    except UnknownWriter as error:
        raise _conflict("writer_unknown", error) from None
    except CommitConflict as error:
        raise _conflict("checkpoint_conflict", error) from None


def routes(app: FastAPI, writers: Writers) -> None:
    """Add the routes."""
    _writers(app, writers)
    _checkpoints(app, writers)


def _writers(app: FastAPI, writers: Writers) -> None:
    @app.post("/v1/writers", status_code=201, responses=WRITE_ERRORS, openapi_extra=json_body(app, Holder))
    async def post_writer(request: Request) -> dict[str, int]:
        body = await decoded(request, Holder, "bad_holder")
        epoch = await writers.issue(body.holder)
        logger().info("new writer", epoch=epoch, holder=body.holder)
        return {"epoch": epoch}

    @app.get("/v1/writers")
    async def newest_writer() -> dict[str, int | str | None]:
        newest = await writers.newest()
        return {"epoch": newest.epoch, "holder": newest.holder} if newest else {"epoch": None, "holder": None}

    @app.get("/v1/writers/{epoch}", responses=WRITER_ERRORS)
    async def confirm_writer(epoch: Number) -> dict[str, int]:
        with writer_errors_as_conflict():
            await writers.check(epoch)
        return {"epoch": epoch}


def _checkpoints(app: FastAPI, writers: Writers) -> None:
    @app.put(
        "/v1/checkpoints/{version}/{writer}",
        response_model=CheckpointId,
        responses={201: {"model": CheckpointId}, **WRITE_ERRORS, **WRITER_ERRORS},
        openapi_extra=json_body(app, Commit),
    )
    async def put_checkpoint(version: Number, writer: Number, request: Request) -> JSONResponse:
        commit = await decoded(request, Commit, "bad_commit")
        with writer_errors_as_conflict():
            new = await writers.commit(Version(version), writer, commit.digest)
        return JSONResponse({"version": version, "writer": writer}, 201 if new else 200)

    @app.delete("/v1/checkpoints/{version}/{writer}", responses=WRITER_ERRORS)
    async def delete_checkpoint(
        version: Number, writer: Number, by: Annotated[int, Query(ge=0, le=MOST)]
    ) -> CheckpointId:
        with writer_errors_as_conflict():
            await writers.withdraw(Version(version), writer, by=by)
        return CheckpointId(version=version, writer=writer)

    @app.get("/v1/checkpoints")
    async def list_checkpoints() -> dict[str, list[dict[str, Any]]]:
        return {"checkpoints": [msgspec.structs.asdict(commit) for commit in await writers.committed()]}


def _conflict(code: str, error: Exception) -> HttpError:
    instruments.REFUSED.labels(code).inc()
    return HttpError(409, code, str(error))
