"""The page and its data. docs/control.md describes them.

The page itself holds nothing of the run, so it needs no token: a browser sends none when it opens an address. Its
requests for data send the token that the person enters.
"""

import pathlib
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from palimpsest.common.control.access import AccessRule, Role
from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.page import records
from palimpsest.common.page.assembly import live_page
from palimpsest.common.page.points import VersionPoint
from palimpsest.services.learner.control.waits import Wait

MOST_BATCHES = 200
MOST_TRAJECTORIES = 1000
MOST_TOKENS = 4000
"""Limits of the replies."""
PAGE_RULES = (
    AccessRule("GET", "/v1/waits", (Role.VIEW,)),
    AccessRule("GET", "/v1/points", (Role.VIEW,)),
    AccessRule("GET", "/v1/batches", (Role.VIEW,)),
)
After = Annotated[int, Query(ge=-1, lt=2**31)]
VersionNumber = Annotated[int, Path(ge=0, lt=10**8)]
RowNumber = Annotated[int, Path(ge=0, lt=10**6)]


class WaitsReply(BaseModel):
    """Who waits for whom."""

    waits: list[Wait]


class PointsReply(BaseModel):
    """Trained versions, oldest first; the newest 1000 at most."""

    points: list[VersionPoint]


class BatchesReply(BaseModel):
    """Versions with a recorded batch, oldest first; the newest 200 at most."""

    versions: list[int]


class BatchReply(BaseModel):
    """Trajectories of a recorded batch; the first 1000 at most."""

    trajectories: list[records.TrajectoryOverview]


def page_routes(
    *,
    waits: Callable[[], list[Wait]],
    points: Callable[[int], list[VersionPoint]],
    folder: pathlib.Path,
    decode: Callable[[int], str],
) -> APIRouter:
    """Return the routes.

    points: returns the points after a version. folder: of the recorded batches. decode: returns the text of a token.
    """
    router = APIRouter()
    text, policy = live_page()

    @router.get(
        "/", response_class=Response, responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
    )
    async def page() -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @router.get("/v1/waits", response_model=WaitsReply)
    async def current_waits() -> WaitsReply:
        return WaitsReply(waits=waits())

    @router.get("/v1/points", response_model=PointsReply)
    async def points_after(after: After = -1) -> PointsReply:
        return PointsReply(points=points(after))

    # plain functions, which run on threads of their own: reading a batch takes milliseconds to seconds
    @router.get("/v1/batches", response_model=BatchesReply)
    def batches() -> BatchesReply:
        return BatchesReply(versions=records.recorded(folder, MOST_BATCHES))

    @router.get("/v1/batches/{version}", response_model=BatchReply, responses=documented(404))
    def batch(version: VersionNumber) -> BatchReply:
        try:
            return BatchReply(trajectories=records.overview(folder, version, MOST_TRAJECTORIES))
        except FileNotFoundError:
            raise _unknown_batch(version) from None

    @router.get("/v1/batches/{version}/{row}", response_model=records.TrajectoryTokens, responses=documented(404))
    def trajectory(version: VersionNumber, row: RowNumber) -> records.TrajectoryTokens:
        try:
            return records.tokens(folder, version, row, MOST_TOKENS, decode)
        except FileNotFoundError:
            raise _unknown_batch(version) from None
        except IndexError:
            raise HttpError(404, "unknown_row", f"the batch of version {version} has no trajectory {row}") from None

    return router


def _unknown_batch(version: int) -> HttpError:
    return HttpError(404, "unknown_batch", f"no readable batch of version {version} is recorded; see GET /v1/batches")
