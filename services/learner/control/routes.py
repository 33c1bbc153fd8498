"""The routes by which people see and change a running learner. docs/control.md describes them."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from palimpsest.common.config.settings import SETTINGS, AppliesFrom, SettingRefused, with_settings
from palimpsest.common.control.access import AccessRule, Role
from palimpsest.common.control.changes import Change, as_json
from palimpsest.common.control.desk import LONGEST_KEY, ControlDesk
from palimpsest.common.control.error_replies import documented
from palimpsest.common.control.errors import HttpError
from palimpsest.common.control.guard import caller_of
from palimpsest.services.learner.control.run_control import CurrentSettings, refuse_missing_parts, settings_reply

LONGEST_WAIT_S = 60.0
"""Maximum of `wait_s`. A client that waits longer asks again."""
LOOK_S = 0.05
"""Seconds between two looks at a change that a request waits for."""
RULES = (
    AccessRule("GET", "/v1/settings", (Role.VIEW,)),
    AccessRule("GET", "/v1/changes", (Role.VIEW,)),
    AccessRule("PATCH", "/v1/settings", (Role.TUNE,)),
    AccessRule("POST", "/v1/actions/", (Role.OPERATE,)),
)
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=LONGEST_KEY)]
Wait = Annotated[float, Query(ge=0, le=LONGEST_WAIT_S, allow_inf_nan=False)]


class SettingsReply(BaseModel):
    """The settings of the run as they are now."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    generation: int
    """Number of changes so far."""
    settings: dict[str, JsonValue]
    """Key -> value, for every key that may change."""
    applies_from: dict[str, str]
    """Key -> when a new value takes effect."""


class ChangeReply(BaseModel):
    """A change and its state."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="allow")

    change: str
    """Id of the change."""
    kind: str
    """`settings`, or the name of the action."""
    what: dict[str, JsonValue]
    """The new values by key, or the arguments of the action."""
    state: Literal["requested", "applied", "refused", "superseded", "lost"]
    """`requested` until the loop reaches a safe point; every other state is final."""
    applies_from: str
    """When the change takes effect."""
    version: int | None
    """Newest version when the change was applied."""
    code: str
    """Why the change was refused or lost."""
    message: str
    """The same for people."""


class ChangesReply(BaseModel):
    """The newest changes."""

    changes: list[ChangeReply]


class PauseRequest(BaseModel):
    """What to pause."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    what: Literal["training", "offers"] = "training"
    """`training`: train no further version. `offers`: offer no further group; what is in flight is trained on."""


NewSettings = Annotated[
    dict[str, JsonValue],
    Field(
        min_length=1, max_length=len(SETTINGS), json_schema_extra={"propertyNames": {"enum": list[JsonValue](SETTINGS)}}
    ),
]
"""docs/configuration.md has the types of the values."""
FINISHED = {"model": ChangeReply, "description": "The change has its final state"}
REQUESTED = {"model": ChangeReply, "description": "The change waits for the loop"}
REPLIES: dict[int | str, dict[str, Any]] = {200: FINISHED, 202: REQUESTED, **documented(409)}


def control_routes(desk: ControlDesk, current: Callable[[], CurrentSettings], *, cuts: bool) -> APIRouter:
    """Return the routes. current: returns the settings as they are now. cuts: whether the run cuts generations."""
    router = APIRouter()
    started_with = current().config

    @router.get("/v1/settings", response_model=SettingsReply)
    async def settings(response: Response) -> dict[str, Any]:
        now = current()
        response.headers["ETag"] = f'"{now.generation}"'
        return settings_reply(now) | {"applies_from": dict(SETTINGS)}

    @router.patch("/v1/settings", status_code=202, responses=REPLIES | documented(412))
    async def change_settings(
        request: Request,
        new: NewSettings,
        if_match: Annotated[str | None, Header(alias="If-Match")] = None,
        key: Key = None,
        wait_s: Wait = 0.0,
    ) -> Response:
        now = current()
        try:
            refuse_missing_parts(with_settings(now.config, new), started_with)
        except SettingRefused as error:
            raise HttpError(422, error.code, str(error)) from None
        _check_generation(if_match, now.generation)
        moments = {SETTINGS[name] for name in new}
        applies_from = ", then ".join(moment for moment in AppliesFrom if moment in moments)
        change = desk.submit("settings", dict(new), caller_of(request.scope), applies_from=applies_from, key=key)
        return await _answer(desk, change, wait_s)

    @router.get("/v1/changes", response_model=ChangesReply)
    async def changes(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        return {"changes": [as_json(change) for change in desk.changes(limit)]}

    @router.get("/v1/changes/{change}", response_model=ChangeReply)
    async def one_change(change: Annotated[str, Field(max_length=64)]) -> dict[str, Any]:
        return as_json(desk.get(change))

    async def act(request: Request, kind: str, what: dict[str, Any], key: str | None, wait_s: float) -> Response:
        change = desk.submit(kind, what, caller_of(request.scope), applies_from=AppliesFrom.SAFE_POINT, key=key)
        return await _answer(desk, change, wait_s)

    @router.post("/v1/actions/pause", status_code=202, responses=REPLIES)
    async def pause(
        request: Request, what: PauseRequest | None = None, key: Key = None, wait_s: Wait = 0.0
    ) -> Response:
        return await act(request, "pause", {"what": (what or PauseRequest()).what}, key, wait_s)

    @router.post("/v1/actions/resume", status_code=202, responses=REPLIES)
    async def resume(request: Request, key: Key = None, wait_s: Wait = 0.0) -> Response:
        return await act(request, "resume", {}, key, wait_s)

    @router.post("/v1/actions/checkpoint", status_code=202, responses=REPLIES)
    async def checkpoint(request: Request, key: Key = None, wait_s: Wait = 0.0) -> Response:
        return await act(request, "checkpoint", {}, key, wait_s)

    @router.post("/v1/actions/cut", status_code=202, responses=REPLIES)
    async def cut(request: Request, key: Key = None, wait_s: Wait = 0.0) -> Response:
        if not cuts:
            raise HttpError(
                409, "no_cut", 'this run does not cut generations: that needs learner.proximal.kind = "interruption"'
            )
        return await act(request, "cut", {}, key, wait_s)

    @router.post("/v1/actions/stop", status_code=202, responses=REPLIES)
    async def stop(request: Request, key: Key = None, wait_s: Wait = 0.0) -> Response:
        return await act(request, "stop", {}, key, wait_s)

    return router


async def _answer(desk: ControlDesk, change: Change, wait_s: float) -> JSONResponse:
    """Wait for the final state of the change, at most `wait_s` seconds, and return the reply."""
    deadline = asyncio.get_running_loop().time() + wait_s
    while not (now := desk.get(change.id)).is_finished and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(LOOK_S)
    return JSONResponse(as_json(now), 200 if now.is_finished else 202)


def _check_generation(sent: str | None, generation: int) -> None:
    """Raise HttpError (412) unless If-Match is absent or names this generation."""
    if sent is not None and sent.strip() not in (f'"{generation}"', str(generation), "*"):
        raise HttpError(
            412,
            "other_generation",
            f"If-Match names {sent[:40]}, but the settings are of generation {generation}: read them again",
        )
