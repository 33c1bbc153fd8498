"""Numbers in paths and JSON bodies of the store's requests, within bounds."""

from typing import Annotated, Any, TypeVar

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
        return msgspec.convert(_with_integers(msgspec.json.decode(await request.body())), kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HttpError(422, code, str(error)) from None


def _with_integers(value: Any) -> Any:
    """Return the value with 3.0 as 3: in JSON Schema, a number without a fraction is an integer."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MOST:
        return int(value)
    if isinstance(value, dict):
        return {key: _with_integers(one) for key, one in value.items()}
    return [_with_integers(one) for one in value] if isinstance(value, list) else value
