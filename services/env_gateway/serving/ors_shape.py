"""An environment for clients of the Open Reward Standard (ORS), without its package: HTTP, calls as server-sent events.

A session is the header X-Session-ID. A task is a split and an index, which is the task seed. A call has a task_id, so
that a client whose stream breaks gets the stored result. The paths also work without the name of the environment.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from palimpsest.common.environments.message_tool import MESSAGE_TOOL
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.services.env_gateway.serving.served_session import ServedSession, ServedSessionFailed

HEADER = "x-session-id"
KEPT_CALLS = 32
"""Results of calls that a session keeps for a broken stream."""
MAX_RANGE = 10000


@dataclass(slots=True)
class Open:
    """A session with the calls that may be asked for again."""

    session: ServedSession
    calls: dict[str, "asyncio.Task[str]"] = field(default_factory=dict)
    over: bool = False


class OrsError(Exception):
    """A request that is refused with this status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class OrsShape:
    """Serves one environment. splits: name of the split -> environment; tasks: number of tasks of each."""

    def __init__(self, sessions: Sessions, environment: str, splits: Mapping[str, str], tasks: int) -> None:
        self._sessions, self._environment, self._splits, self._count = sessions, environment, splits, tasks
        self._open: dict[str, Open] = {}

    def add_routes(self, app: FastAPI) -> None:
        """Add the routes of the protocol."""
        fixed = {
            ("GET", "/health"): self._health,
            ("GET", "/list_environments"): self._environments,
            ("POST", "/create_session"): self._create_session,
            ("POST", "/delete_session"): self._delete,
            ("POST", "/create"): self._create,
            ("POST", "/delete"): self._delete,
            ("POST", "/ping"): self._ping,
        }
        named = {
            ("GET", "/splits"): self._list_splits,
            ("POST", "/num_tasks"): self._num_tasks,
            ("POST", "/tasks"): self._tasks,
            ("POST", "/task"): self._task,
            ("POST", "/task_range"): self._task_range,
            ("GET", "/tools"): self._tools,
            ("GET", "/task_tools"): self._tools,
            ("GET", "/prompt"): self._prompt,
            ("POST", "/call"): self._call,
        }
        for (method, path), answer in fixed.items():
            app.add_api_route(path, _route(answer), methods=[method])
        for (method, path), answer in named.items():
            app.add_api_route(f"/{self._environment}{path}", _route(answer), methods=[method])
            app.add_api_route(path, _route(answer), methods=[method])

    def sweep(self) -> None:
        """Forget the sessions that ended long ago."""
        for key, one in list(self._open.items()):
            if not self._sessions.has(one.session.id):
                del self._open[key]

    async def _health(self, _: Request) -> Any:
        return {"status": "ok"}

    async def _environments(self, _: Request) -> Any:
        return [self._environment]

    async def _create_session(self, _: Request) -> Response:
        return _events(_given([("task_id", secrets.token_hex(16)), ("end", "")]))

    async def _create(self, request: Request) -> Any:
        body, key = await _body(request), _key(request)
        if key in self._open:
            raise OrsError(400, "the session has a task")
        name, spec = body.get("env_name"), body.get("task_spec") or body
        if name not in (None, self._environment):
            raise OrsError(404, f"there is no environment {name!r}, only {self._environment}")
        environment, index = self._split(spec), self._index(spec.get("index"))
        try:
            self._open[key] = Open(await ServedSession.begin(self._sessions, environment, index))
        except ServedSessionFailed as error:
            raise OrsError(429 if error.code == "capacity" else 500, str(error)) from None
        return {"sid": key}

    async def _delete(self, request: Request) -> Any:
        key = _key(request)
        if one := self._open.pop(key, None):
            one.session.close()
        return {"sid": key}

    async def _ping(self, request: Request) -> Any:
        one = self._session(request)
        if not one.over:
            try:
                one.session.keep()
            except ServedSessionFailed as error:
                raise OrsError(404, str(error)) from None
        return {"status": "ok"}

    async def _list_splits(self, _: Request) -> Any:
        return [
            {"name": name, "type": name if name in ("train", "validation", "test") else "test"} for name in self._splits
        ]

    async def _num_tasks(self, request: Request) -> Any:
        self._split(await _body(request))
        return {"num_tasks": self._count}

    async def _tasks(self, request: Request) -> Any:
        body = await _body(request)
        self._split(body)
        return {"tasks": self._specs(body, 0, self._count), "env_name": self._environment}

    async def _task(self, request: Request) -> Any:
        body = await _body(request)
        self._split(body)
        index = self._index(body.get("index"))
        return {"task": self._specs(body, index, index + 1)[0], "env_name": self._environment}

    async def _task_range(self, request: Request) -> Any:
        body = await _body(request)
        self._split(body)
        start, stop = body.get("start") or 0, body.get("stop")
        stop = self._count if stop is None else stop
        if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop <= self._count):
            raise OrsError(400, "Invalid index range")
        return {"tasks": self._specs(body, start, stop), "env_name": self._environment}

    async def _tools(self, request: Request) -> Any:
        tools = self._session(request).session.tools
        return {
            "tools": [{"name": one.name, "description": one.description, "input_schema": one.schema} for one in tools],
            "terminal_tool": None,
        }

    async def _prompt(self, request: Request) -> Any:
        return [_block(self._session(request).session.prompt)]

    async def _call(self, request: Request) -> Response:
        one, body = self._session(request), await _body(request)
        wanted = body.get("task_id")
        if wanted is not None:
            if (task := one.calls.get(str(wanted))) is None:
                raise OrsError(404, "the result of this call is not kept")
            return _events(_followed(str(wanted), task))
        name, arguments = body.get("name"), body.get("input") or {}
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise OrsError(422, "a call has `name` and an object `input`")
        made = secrets.token_hex(16)
        one.calls[made] = task = asyncio.create_task(_called(one, name, arguments))
        while len(one.calls) > KEPT_CALLS:
            del one.calls[next(iter(one.calls))]
        return _events(_followed(made, task))

    def _session(self, request: Request) -> Open:
        one = self._open.get(_key(request))
        if one is None:
            raise OrsError(404, "Active environment not found")
        return one

    def _split(self, body: Mapping[str, Any]) -> str:
        """Return the environment of a split."""
        found = self._splits.get(str(body.get("split")))
        if found is None:
            raise OrsError(400, f"Invalid split: there are {', '.join(self._splits)}")
        return found

    def _index(self, index: Any) -> int:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self._count:
            raise OrsError(400, f"Invalid index: tasks are 0 to {self._count - 1}")
        return index

    def _specs(self, body: Mapping[str, Any], start: int, stop: int) -> list[dict[str, Any]]:
        if stop - start > MAX_RANGE:
            raise OrsError(400, f"at most {MAX_RANGE} tasks are listed at once: use num_tasks and task")
        return [{"split": body["split"], "index": index} for index in range(start, stop)]


async def _called(one: Open, name: str, arguments: Mapping[str, Any]) -> str:
    """Return the result of a call as JSON. Raises ServedSessionFailed."""
    if one.over:
        return json.dumps({"ok": False, "error": "the task is over", "reason": "episode_finished"})
    known = [tool.name for tool in one.session.tools]
    if name not in known:
        return json.dumps({"ok": False, "error": f"Tool not found: {name}", "reason": "not_found"})
    if name == MESSAGE_TOOL and not isinstance(arguments.get("text"), str):
        return json.dumps({"ok": False, "error": f"{name} needs `text`", "reason": "input_validation"})
    result = await one.session.call(name, arguments)
    one.over = result.done
    output = {"blocks": [_block(result.text)], "metadata": None, "reward": result.reward, "finished": result.done}
    return json.dumps({"ok": True, "output": output})


async def _followed(name: str, task: "asyncio.Task[str]") -> AsyncIterator[tuple[str, str]]:
    """Yield the id of a call, and then its result. The call continues without the client."""
    yield "task_id", name
    try:
        yield "end", await asyncio.shield(task)
    except ServedSessionFailed as error:
        yield "error", str(error)


async def _given(events: list[tuple[str, str]]) -> AsyncIterator[tuple[str, str]]:
    for event in events:
        yield event


def _events(events: AsyncIterator[tuple[str, str]]) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async for event, data in events:
            text = "".join(f"data: {line}\r\n" for line in data.split("\n"))
            yield f"event: {event}\r\n{text}\r\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _route(answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    async def answered(request: Request) -> Response:
        try:
            found = await answer(request)
        except OrsError as error:
            return JSONResponse({"detail": str(error)}, error.status)
        return found if isinstance(found, Response) else JSONResponse(found)

    return answered


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body() or b"{}")
    except ValueError:
        raise OrsError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise OrsError(422, "the body is not an object")
    return body


def _key(request: Request) -> str:
    key = request.headers.get(HEADER, "")
    if not 0 < len(key) <= 128:
        raise OrsError(400, "X-Session-ID is missing: POST /create_session makes one")
    return key


def _block(text: str) -> dict[str, Any]:
    return {"text": text, "detail": None, "type": "text"}
