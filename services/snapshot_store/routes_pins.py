"""The store's routes for pins.

PUT    /v1/pins/{version}    {"name": text, "seconds": number or null}: keep the version; 404 version_missing
DELETE /v1/pins/{version}    ?name=text: release the pin; 404 pin_missing
GET    /v1/pins              version -> name -> end in Unix seconds, null without an end

A change needs the role `operate`, or `service`: the learner pins the version with the best evaluation.
"""

from typing import Annotated

import msgspec
from fastapi import FastAPI, Query, Request

from palimpsest.common.control.access import AccessRule, Role
from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.openapi import json_body
from palimpsest.common.logs import logger
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.bodies import WRITE_ERRORS, WRITER_ERRORS, Number, decoded
from palimpsest.services.snapshot_store.catalog import Catalog
from palimpsest.services.snapshot_store.pins import TooManyPins

RULES = (
    AccessRule("PUT", "/v1/pins/", (Role.OPERATE, Role.SERVICE)),
    AccessRule("DELETE", "/v1/pins/", (Role.OPERATE, Role.SERVICE)),
    AccessRule("GET", "/v1/pins", (Role.VIEW,)),
)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PUT /v1/pins/{version}."""

    name: Annotated[str, msgspec.Meta(pattern=NAME.removesuffix("$") + r"\Z", extra_json_schema={"pattern": NAME})]
    seconds: Annotated[float, msgspec.Meta(gt=0, le=1e10)] | None = None
    """Time for which the pin holds; null: until it is released."""


def routes(app: FastAPI, catalog: Catalog) -> None:
    """Add the routes."""

    @app.put(
        "/v1/pins/{version}", responses={**WRITE_ERRORS, **WRITER_ERRORS}, openapi_extra=json_body(app, PinRequest)
    )
    async def put_pin(version: Number, request: Request) -> dict[str, float | str | None]:
        wanted = await decoded(request, PinRequest, "bad_pin")
        try:
            end = await catalog.pin(Version(version), wanted.name, seconds=wanted.seconds)
        except KeyError:
            raise HttpError(404, "version_missing", f"no version {version}") from None
        except TooManyPins as error:
            raise HttpError(409, "too_many_pins", str(error)) from None
        logger().info("pinned", version=version, name=wanted.name, until=end)
        return {"version": version, "name": wanted.name, "until": end}

    @app.delete("/v1/pins/{version}", responses={**WRITE_ERRORS, **documented(404)})
    async def delete_pin(version: Number, name: Annotated[str, Query(pattern=NAME)]) -> dict[str, int | str]:
        if not await catalog.unpin(Version(version), name):
            raise HttpError(404, "pin_missing", f"version {version} has no pin {name}")
        return {"version": version, "name": name}

    @app.get("/v1/pins")
    async def list_pins() -> dict[str, dict[str, dict[str, float | None]]]:
        return {"pins": {str(version): names for version, names in catalog.pins.all().items()}}
