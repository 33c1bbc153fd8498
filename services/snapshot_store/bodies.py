"""Numbers in paths and JSON bodies of the store's requests, within bounds."""

from typing import Annotated, TypeVar

import msgspec
from fastapi import Path, Request

from palimpsest.common.control.errors import HttpError

T = TypeVar("T")
MOST = 2**53 - 1
"""Highest version and epoch: every JSON reader has it exactly."""
Number = Annotated[int, Path(ge=0, le=MOST)]


async def decoded(request: Request, kind: type[T], code: str) -> T:
    """Return the JSON body of the request. Raises HttpError (422) with this code."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HttpError(422, code, str(error)) from None
