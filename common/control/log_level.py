"""The routes by which people change the log level of a service that reads no log topic: the gateway and the store.

The level holds until the service ends; it starts again with `logs.level`. Learner, workers and replicas take the level
from the settings of the run.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from palimpsest.common import logs
from palimpsest.common.config.settings import LOG_LEVEL
from palimpsest.common.control.access import AccessRule, Role
from palimpsest.common.control.guard import caller_of
from palimpsest.common.logs import logger

RULES = (
    AccessRule("GET", "/v1/settings", (Role.VIEW,)),
    AccessRule("PATCH", "/v1/settings", (Role.TUNE,)),
)
AT_ONCE = "at once"


class LevelRequest(BaseModel):
    """Body of PATCH /v1/settings of the gateway and the store."""

    model_config = ConfigDict(extra="forbid", validate_by_name=False)

    level: Annotated[Literal["debug", "info", "warning", "error"], Field(alias=LOG_LEVEL)]


def level_routes() -> APIRouter:
    """Return the routes. Their replies have the fields of the learner's."""
    router = APIRouter()

    @router.get("/v1/settings")
    async def settings() -> dict[str, Any]:
        """Return the log level."""
        return {"settings": {LOG_LEVEL: logs.level()}, "applies_from": {LOG_LEVEL: AT_ONCE}}

    @router.patch("/v1/settings")
    async def change_level(request: Request, new: LevelRequest) -> dict[str, Any]:
        """Log from this level on."""
        before = logs.level()
        logs.set_level(new.level)
        logger().info("setting", key=LOG_LEVEL, value=new.level, by=caller_of(request.scope).name)
        return {
            "kind": "settings",
            "state": "applied",
            "applies_from": AT_ONCE,
            "what": {LOG_LEVEL: new.level},
            "before": {LOG_LEVEL: before},
        }

    return router
