"""The tools of an environment over the Model Context Protocol: streamable HTTP with JSON replies.

    POST /tasks/{seed}/mcp     one JSON-RPC request; `initialize` begins a session (Mcp-Session-Id)
    DELETE /tasks/{seed}/mcp   ends it

/mcp is the task 0. There are tools and no reward: MCP has none, and a model must not choose its reward.
"""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from palimpsest.common.logs import logger
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.services.env_gateway.serving.json_rpc import (
    INTERNAL,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    RpcError,
    call_of,
    failure,
    reply,
    request_of,
)
from palimpsest.services.env_gateway.serving.served_session import ServedSession, ServedSessionFailed, Tool

VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26")
"""Versions of the protocol, the newest first."""
HEADER = "mcp-session-id"


class McpShape:
    """Serves one environment."""

    def __init__(self, sessions: Sessions, environment: str, version: str) -> None:
        self._sessions, self._environment, self._version = sessions, environment, version
        self._served: dict[str, ServedSession] = {}

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of the protocol."""
        app.add_api_route("/mcp", self._post, methods=["POST"])
        app.add_api_route("/mcp", self._delete, methods=["DELETE"])
        app.add_api_route("/tasks/{seed}/mcp", self._post, methods=["POST"])
        app.add_api_route("/tasks/{seed}/mcp", self._delete, methods=["DELETE"])

    def sweep(self) -> None:
        """Forget the sessions that have ended."""
        for key, session in list(self._served.items()):
            if not _known(self._sessions, session):
                del self._served[key]

    async def _post(self, request: Request) -> Response:
        """Answer one request; a notification has no answer."""
        try:
            message = json.loads(await request.body())
        except ValueError:
            return JSONResponse(failure(None, RpcError(INVALID_REQUEST, "the body is not JSON")), 400)
        try:
            method, params = request_of(message)
            if "id" not in message:
                return Response(status_code=202)
            if method == "initialize":
                session = await self._begin(request.path_params.get("seed", "0"))
                return JSONResponse(reply(message, self._greeting(session, params)), headers={HEADER: session.id})
            known = self._served.get(request.headers.get(HEADER, ""))
            if method == "server/discover" or (known is None and HEADER not in request.headers):
                raise RpcError(METHOD_NOT_FOUND, f"{method}: begin with `initialize`")
            if known is None:
                return JSONResponse(failure(message, RpcError(INVALID_REQUEST, "there is no such session")), 404)
            return JSONResponse(reply(message, await _answered(known, method, params)))
        except RpcError as error:
            return JSONResponse(failure(message, error))

    async def _delete(self, request: Request) -> Response:
        session = self._served.pop(request.headers.get(HEADER, ""), None)
        if session is not None:
            session.close()
        return Response(status_code=404 if session is None else 204)

    async def _begin(self, seed: str) -> ServedSession:
        if not (seed.isascii() and seed.isdecimal()):
            raise RpcError(INVALID_REQUEST, "the address is /tasks/SEED/mcp with a number")
        try:
            session = await ServedSession.begin(self._sessions, self._environment, int(seed))
        except ServedSessionFailed as error:
            raise RpcError(INTERNAL, str(error)) from None
        self._served[session.id] = session
        return session

    def _greeting(self, session: ServedSession, params: Mapping[str, Any]) -> dict[str, Any]:
        wanted = params.get("protocolVersion")
        return {
            "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": self._environment, "version": self._version},
            "instructions": session.prompt,
        }


async def _answered(session: ServedSession, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a request in a session. Raises RpcError."""
    match method:
        case "ping":
            return {}
        case "tools/list":
            return {"tools": [_listed(one) for one in session.tools]}
        case "tools/call":
            name, arguments = call_of(params)
            try:
                result = await session.call(name, arguments)
            except ServedSessionFailed as error:
                return _content(str(error), failed=True)
            if result.done:
                logger().info("session over", session=session.id, reward=result.reward, success=result.success)
            return _content(result.text, failed=False)
    raise RpcError(METHOD_NOT_FOUND, f"{method} is not served: this server has tools alone")


def _listed(one: Tool) -> dict[str, Any]:
    return {"name": one.name, "description": one.description, "inputSchema": {"type": "object", **one.schema}}


def _content(text: str, *, failed: bool) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], "isError": failed}


def _known(sessions: Sessions, session: ServedSession) -> bool:
    return sessions.has(session.id)
