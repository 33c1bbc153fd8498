"""Numbers in paths and JSON bodies of the store's requests, within bounds."""

from typing import Annotated, TypeVar

import msgspec
from fastapi import Path, Request

from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError

T = TypeVar("T")
MOST = 2**53 - 1
"""Highest version and epoch: every JSON reader has it exactly."""
Number = Annotated[int, Path(ge=0, le=MOST)]
WRITE_ERRORS = documented(507)
"""The OpenAPI responses of a route that writes to the storage, besides those of every route."""
WRITER_ERRORS = documented(409)
"""The OpenAPI responses of a route that checks the writer's epoch."""


async def decoded(request: Request, kind: type[T], code: str) -> T:
    """Return the JSON body of the request. Raises HttpError (422) with this code."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HttpError(422, code, str(error)) from None
