"""An environment for clients of OpenEnv, without its package.

    WS /ws          reset, step, state, close; a step calls a tool
    POST /mcp       JSON-RPC: openenv/session/create and close, tools/list, tools/call
    GET /schema, /metadata, /health

A connection with ?session_id= shares the session that /mcp created. Steps are not numbered in this protocol, so a
client that lost a reply must reset.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, Response

from palimpsest.common.control.access import Access
from palimpsest.common.control.errors import HttpError
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.services.env_gateway.serving.json_rpc import (
    INTERNAL,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    RpcError,
    call_of,
    failure,
    reply,
    request_of,
)
from palimpsest.services.env_gateway.serving.served_session import Result, ServedSession, ServedSessionFailed, Tool

MAX_PLACES = 4096
"""Sessions of /mcp that have not begun a task."""
REFUSED = 4403
"""Code with which a connection without access is closed."""
ACTION = {
    "title": "CallToolAction",
    "type": "object",
    "properties": {
        "type": {"const": "call_tool", "default": "call_tool", "type": "string"},
        "tool_name": {"type": "string"},
        "arguments": {"type": "object"},
    },
    "required": ["tool_name"],
}


@dataclass(slots=True)
class ClientTask:
    """The session of one client; it has a task after the first reset."""

    session: ServedSession | None = None

    def close(self) -> None:
        """End the task."""
        if self.session is not None:
            self.session.close()
        self.session = None


class OpenEnvError(Exception):
    """A message that cannot be answered."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class OpenEnvShape:
    """Serves one environment. tools: those of the task 0, for clients that list them before a reset."""

    def __init__(self, sessions: Sessions, environment: str, version: str, tools: list[Tool], access: Access) -> None:
        self._sessions, self._environment, self._version = sessions, environment, version
        self._tools, self._access = tools, access
        self._places: dict[str, ClientTask] = {}

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of the protocol."""
        about = {"name": self._environment, "description": self._environment, "version": self._version}
        loose = {"type": "object", "additionalProperties": True}
        schema = {"action": ACTION, "observation": loose, "state": loose}
        app.add_api_route("/health", lambda: {"status": "healthy"}, methods=["GET"])
        app.add_api_route("/metadata", lambda: about, methods=["GET"])
        app.add_api_route("/schema", lambda: schema, methods=["GET"])
        app.add_api_route("/mcp", self._mcp, methods=["POST"])
        app.add_api_websocket_route("/ws", self._connection)

    def sweep(self) -> None:
        """Forget the sessions of /mcp whose task is forgotten."""
        for key, place in list(self._places.items()):
            if place.session is not None and not self._sessions.has(place.session.id):
                del self._places[key]

    async def _connection(self, socket: WebSocket) -> None:
        try:
            self._access.check("POST", socket.url.path, socket.scope["headers"], ())
        except HttpError:
            await socket.close(REFUSED)
            return
        await socket.accept()
        shared = socket.query_params.get("session_id", "")
        place = self._places.get(shared) or ClientTask()
        try:
            while True:
                try:
                    message = json.loads(await socket.receive_text())
                    if isinstance(message, Mapping) and message.get("type") == "close":
                        break
                    answer = await self._answer(place, message)
                except OpenEnvError as error:
                    answer = {"type": "error", "data": {"message": str(error), "code": error.code}}
                except ValueError:
                    answer = {"type": "error", "data": {"message": "a message is JSON", "code": "INVALID_JSON"}}
                await socket.send_text(json.dumps(answer))
        except WebSocketDisconnect:
            pass
        finally:
            if shared not in self._places:
                place.close()

    async def _answer(self, place: ClientTask, message: Any) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("data", {}), Mapping):
            raise OpenEnvError("VALIDATION_ERROR", "a message is an object with `type` and `data`")
        data = message.get("data") or {}
        match message.get("type"):
            case "reset":
                return _observed({"prompt": (await self._reset(place, data)).prompt}, None)
            case "step":
                return await self._step(place, data)
            case "state":
                state = {"episode_id": place.session and place.session.id, "step_count": _steps(place)}
                return {"type": "state", "data": state}
        raise OpenEnvError("UNKNOWN_TYPE", f"there is no message {message.get('type')!r}")

    async def _reset(self, place: ClientTask, data: Mapping[str, Any]) -> ServedSession:
        seed = data.get("seed", 0)
        seed = 0 if seed is None else seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise OpenEnvError("VALIDATION_ERROR", "`seed` is an integer of at least 0")
        place.close()
        try:
            place.session = await ServedSession.begin(self._sessions, self._environment, seed)
        except ServedSessionFailed as error:
            raise OpenEnvError(
                "CAPACITY_REACHED" if error.code == "capacity" else "EXECUTION_ERROR", str(error)
            ) from None
        return place.session

    async def _step(self, place: ClientTask, data: Mapping[str, Any]) -> dict[str, Any]:
        if data.get("type") == "list_tools":
            return _observed({"tools": [_listed(one) for one in self._tools_of(place)]}, None)
        name, arguments = data.get("tool_name"), data.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise OpenEnvError(
                "VALIDATION_ERROR", "an action has `tool_name` and an object `arguments`, or is list_tools"
            )
        try:
            result = await _begun(place).call(name, arguments)
        except ServedSessionFailed as error:
            raise OpenEnvError("EXECUTION_ERROR", str(error)) from None
        return _observed({"tool_name": name, "result": result.text, "error": None}, result)

    async def _mcp(self, request: Request) -> Response:
        """Answer one JSON-RPC request."""
        try:
            message = json.loads(await request.body())
        except ValueError:
            return JSONResponse(failure(None, RpcError(INVALID_REQUEST, "the body is not JSON")))
        try:
            method, params = request_of(message)
            return JSONResponse(reply(message, await self._called(method, params)))
        except RpcError as error:
            return JSONResponse(failure(message, error))

    async def _called(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        if method == "openenv/session/create":
            if len(self._places) >= MAX_PLACES:
                raise RpcError(INTERNAL, "there are too many sessions")
            self._places[made := secrets.token_hex(16)] = ClientTask()
            return {"session_id": made}
        place = self._places.get(str(params.get("session_id", "")))
        if place is None and (method != "tools/list" or "session_id" in params):
            raise RpcError(INVALID_PARAMS, "there is no such session: openenv/session/create makes one")
        match method:
            case "openenv/session/close":
                self._places.pop(str(params["session_id"])).close()
                return {"closed": True}
            case "tools/list":
                return {"tools": [_listed(one) for one in self._tools_of(place or ClientTask())]}
            case "tools/call":
                name, arguments = call_of(params)
                assert place is not None
                try:
                    return {"data": (await _begun(place).call(name, arguments)).text}
                except (ServedSessionFailed, OpenEnvError) as error:
                    raise RpcError(INTERNAL, str(error)) from None
        raise RpcError(METHOD_NOT_FOUND, f"there is no method {method}")

    def _tools_of(self, place: ClientTask) -> list[Tool]:
        return self._tools if place.session is None else place.session.tools


def _begun(place: ClientTask) -> ServedSession:
    if place.session is None:
        raise OpenEnvError("EXECUTION_ERROR", "send reset first")
    return place.session


def _steps(place: ClientTask) -> int:
    return 0 if place.session is None else place.session.steps


def _listed(one: Tool) -> dict[str, Any]:
    return {"name": one.name, "description": one.description, "input_schema": dict(one.schema)}


def _observed(observation: Mapping[str, Any], result: Result | None) -> dict[str, Any]:
    reward, done = (None, False) if result is None else (result.reward, result.done)
    return {"type": "observation", "data": {"observation": dict(observation), "reward": reward, "done": done}}
