"""The HTTP endpoints that agent programs speak to. The key of a request is the key of a session.

    POST /v1/chat/completions, /v1/responses    as OpenAI's
    POST /v1/messages                           as Anthropic's
    GET  /v1/models                             one model
    GET  /v1/session                            the task
    POST /v1/session/step                       a step in the environment of the session
    POST /v1/session/reward                     the reward, which ends the session

A message leaves the worker when it is complete and the canaries have verified its versions. A stream sends comments
until then, and the message in the usual events.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from palimpsest.common.metrics import REGISTRY
from palimpsest.common.service import Server, application
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.agents import anthropic_messages, openai_chat, openai_responses
from palimpsest.services.rollout.agents.open_sessions import OpenSession, OpenSessions
from palimpsest.services.rollout.agents.requests import Completion, Refused
from palimpsest.services.rollout.agents.runner import AgentRunner

T = TypeVar("T")
HOST = "127.0.0.1"
"""Only programs on this machine can reach the endpoints: the worker starts them itself."""
BODY_BYTES = 16 * 2**20
"""Maximum size of a request: a long conversation."""
COMMENT_S = 10.0
"""Interval between comments in a stream that waits for its message, in seconds."""
_KINDS = {"/v1/chat/completions": openai_chat, "/v1/responses": openai_responses, "/v1/messages": anthropic_messages}


def agent_app(sessions: OpenSessions, loop: asyncio.AbstractEventLoop) -> FastAPI:
    """Return the application. loop: the worker's event loop, on which the sessions live."""
    app = application("agents", registry=REGISTRY, ready=lambda: None, status=dict, body_limits={"/v1/": BODY_BYTES})
    app.include_router(_Routes(sessions, loop).router())
    return app


@contextmanager
def serving(runner: AgentRunner) -> Iterator[None]:
    """Serve the sessions of a runner on a loopback address inside the block. Call it on the worker's event loop."""
    app = agent_app(runner.open, asyncio.get_running_loop())
    with Server(app, HOST, 0, key="rollout.agents") as server:
        runner.address = f"http://{HOST}:{server.port}"
        yield


class _Routes:
    def __init__(self, sessions: OpenSessions, loop: asyncio.AbstractEventLoop) -> None:
        self._sessions, self._loop = sessions, loop

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        for path, kind in _KINDS.items():
            router.add_api_route(path, self._model_route(kind), methods=["POST"], response_model=None)
        router.add_api_route("/v1/models", self._answering(_models), methods=["GET"], response_model=None)
        router.add_api_route("/v1/session", self._answering(OpenSession.task), methods=["GET"], response_model=None)
        for name, act in (("step", OpenSession.step), ("reward", OpenSession.post_reward)):
            path = f"/v1/session/{name}"
            router.add_api_route(path, self._answering(act, body=True), methods=["POST"], response_model=None)
        return router

    def _model_route(self, kind: ModuleType) -> Any:
        errors = getattr(kind, "error_body", openai_chat.error_body)

        async def answer(request: Request) -> Response:
            try:
                session = self._sessions.of(_key(request))
                asked = kind.parse(await _body(request), temperature=session.temperature)
                idempotency = request.headers.get("idempotency-key", "")
                task = await self._on_loop(session.ask(asked, idempotency))
                if asked.stream:
                    lines = self._stream(kind, errors, task)
                    return StreamingResponse(lines, media_type="text/event-stream")
                return JSONResponse(kind.reply(await self._on_loop(_result(task)), int(time.time())))
            except Refused as error:
                instruments.AGENT_MESSAGES.labels("refused").inc()
                return JSONResponse(errors(error), error.status)

        return answer

    async def _stream(self, kind: ModuleType, errors: Any, task: "asyncio.Task[Completion]") -> AsyncIterator[str]:
        waiting = asyncio.ensure_future(self._on_loop(_result(task)))
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=COMMENT_S)
            if not waiting.done():
                yield ": waiting\n\n"
        try:
            events: Iterator[tuple[str, Any]] = kind.events(waiting.result(), int(time.time()))
            for name, data in events:
                yield _event(name, data)
        except Refused as error:
            yield _event("error", errors(error))

    def _answering(self, act: Any, *, body: bool = False) -> Any:
        async def answer(request: Request) -> Response:
            try:
                session = self._sessions.of(_key(request))
                given = (await _body(request),) if body else ()
                return JSONResponse(await self._on_loop(act(session, *given)))
            except Refused as error:
                return JSONResponse(openai_chat.error_body(error), error.status)

        return answer

    async def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the worker's loop; a client that leaves does not cancel it."""
        return await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop)))


async def _models(_session: OpenSession) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": openai_chat.MODEL, "object": "model", "owned_by": "palimpsest"}]}


async def _result(task: "asyncio.Task[Completion]") -> Completion:
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        raise Refused("the session has ended", status=409, code="session_ended") from None
    except Exception as error:
        raise Refused(f"the message could not be sampled: {error}", status=409, code="engine_failed") from None


def _key(request: Request) -> str:
    """Return the key of a request: `Authorization: Bearer KEY` or `x-api-key: KEY`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None


def _event(name: str, data: Any) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
