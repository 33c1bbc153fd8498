"""The route by which people drain a service: it takes no new work, finishes what it has, and ends with code 0.

The code is 0 and not 130, so that a Kubernetes Job counts a drained worker as done and does not replace it.
"""

from collections.abc import Callable

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from palimpsest.common.control.access import AccessRule, Role
from palimpsest.common.control.guard import caller_of
from palimpsest.common.logs import logger

RULES = (AccessRule("POST", "/v1/actions/drain", (Role.OPERATE,)),)


class DrainReply(BaseModel):
    """The service drains."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: str = "drain"
    state: str = "applied"
    live: int
    """Trajectories or sessions that end first."""


def drain_routes(drain: Callable[[], None], live: Callable[[], int]) -> APIRouter:
    """Return the route.

    drain: starts the draining; a repeated call has no effect. live: returns the number of trajectories or sessions.
    """
    router = APIRouter()

    @router.post("/v1/actions/drain", status_code=202)
    async def start_draining(request: Request) -> DrainReply:
        """Take no new work, finish what is live, then end."""
        found = live()
        logger().info("drain", by=caller_of(request.scope).name, live=found)
        drain()
        return DrainReply(live=found)

    return router
