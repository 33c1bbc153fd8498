"""Tools of a Model Context Protocol (MCP) server, for the tasks of an environment of your own.

MCP has tools and no tasks or rewards, so `tasks` names a class with both (a plugin, from_tools, from_dataset). The
model sees its tools and those of the server. Each session has a client and, with `command`, a server process of its
own, because all sessions of one server share its state.
"""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.port import Environment, Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.services.env_gateway.adapters.adapter import AdapterEnvironment, AdapterUnusable, function_schema
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec
from palimpsest.services.env_gateway.proxy.client import proxy_variables

START_S = 30.0
"""Time limit for the connection to a server, in seconds."""
CLOSE_S = 5.0
MAX_TURNS = 64
SEED = "{seed}"
"""In a URL: the task seed of the session."""


class McpTools(AdapterEnvironment):
    """See port.py. `command` starts a server, or `url` is that of one; `tasks` is `module:Class`."""

    version = "mcp"
    extra = "mcp"

    def reset(self, seed: int) -> Opening:
        self.needed("tasks")
        if bool(self.settings.command) == bool(self.settings.url):
            raise AdapterUnusable("kind 'mcp' needs either `command` or `url`")
        self._inner = self._tasks()
        opening = self._inner.reset(seed)
        self._connection = McpConnection(self._target(self.settings.url.replace(SEED, str(seed))))
        tools = self._connection.tools()
        if not tools:
            raise AdapterUnusable("the MCP server has no tools")
        self._names = {tool.name for tool in tools}
        own = {str(schema.get("function", {}).get("name")) for schema in opening.tools}
        if both := self._names & own:
            raise AdapterUnusable(f"the MCP server and {self.settings.tasks} both have {', '.join(sorted(both))}")
        schemas = [function_schema(one.name, one.description or one.name, one.input_schema) for one in tools]
        self._turns, self._calls = 0, list[Any]()
        return Opening(tuple(opening.messages), (*opening.tools, *schemas))

    def step(self, turn: Turn) -> Outcome:
        self._turns += 1
        rest = tuple(one for one in turn.attempts if getattr(one, "name", None) not in self._names)
        own: Iterator[Message] = iter(())
        errors, messages = 0, list[Message]()
        if rest or not turn.attempts:
            outcome = self._inner.step(Turn(turn.text, rest))
            if not isinstance(outcome, Reply):
                return outcome
            if not turn.attempts:
                return outcome
            own, errors = iter(outcome.messages), outcome.tool_errors
        for call in turn.calls:
            if call.name not in self._names:
                messages.append(next(own))
                continue
            text, failed = self._connection.call(call.name, call.arguments)
            self._calls.append([call.name, call.arguments, text])
            errors += failed
            messages.append(Message(role="tool", content=text))
        if self._turns >= MAX_TURNS:
            return self._inner.finalize()
        return Reply((*messages, *own), errors)

    def finalize(self) -> Score:
        return self._inner.finalize()

    def state_hash(self) -> str:
        return hash_of(self._inner.state_hash(), self._calls)

    def close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()

    def about(self) -> str:
        return f"{self.settings.tasks} with {len(self._names)} tools of an MCP server"

    def _tasks(self) -> Environment:
        try:
            made = EnvironmentSpec(path=self.settings.tasks).load()
        except (ImportError, AttributeError) as error:
            raise AdapterUnusable(f"`tasks` {self.settings.tasks} cannot be imported: {error}") from None
        environment: Environment = made(self.settings.split) if getattr(made, "splits", ()) else made()
        return environment

    def _target(self, url: str) -> Any:
        mcp = self.imported("mcp")
        if url:
            token = os.environ.get(self.settings.token_variable, "") if self.settings.token_variable else ""
            return partial(self.imported(f"{__package__}.mcp_http").over_http, url, token)
        command, *arguments = self.settings.command
        return mcp.StdioServerParameters(command=command, args=arguments, env=proxy_variables())


class McpConnection:
    """A client in a thread of its own: one task enters it, serves the calls and leaves it, as the package requires."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._jobs: asyncio.Queue[tuple[Callable[[Any], Coroutine[Any, Any, Any]], asyncio.Future[Any]] | None]
        self._jobs = asyncio.Queue()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._wait_ready(), self._loop).result(START_S)
        except Exception as error:
            shown = " ".join(str(target.args[0] if isinstance(target, partial) else target).split())[:200]
            raise AdapterUnusable(f"the MCP server {shown} cannot be reached: {_cause(error)}") from None

    def tools(self) -> list[Any]:
        """Return all tools of the server."""

        async def listed(client: Any) -> list[Any]:
            found, cursor = list[Any](), None
            while True:
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    return found

        result: list[Any] = self._run(listed)
        return result

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Call a tool. Return its text and whether it failed. A dead transport raises."""
        result = self._run(lambda client: client.call_tool(name, arguments))
        texts = [one.text for one in result.content if getattr(one, "type", "") == "text"]
        if not texts and result.structured_content is not None:
            texts = [json.dumps(result.structured_content)]
        return "\n".join(texts), bool(result.is_error)

    def close(self) -> None:
        """Leave the client, which ends its session and its server process."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._jobs.put_nowait, None)
            self._thread.join(CLOSE_S)

    def _run(self, job: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        async def queued() -> Any:
            answer = self._loop.create_future()
            self._jobs.put_nowait((job, answer))
            return await answer

        if not self._thread.is_alive():
            raise ConnectionError("the MCP server ended the connection")
        return asyncio.run_coroutine_threadsafe(queued(), self._loop).result()

    async def _wait_ready(self) -> None:
        await self._ready

    async def _serve(self) -> None:
        from mcp import Client

        try:
            async with Client(self._target() if isinstance(self._target, partial) else self._target) as client:
                self._ready.set_result(None)
                while (work := await self._jobs.get()) is not None:
                    job, answer = work
                    try:
                        answer.set_result(await job(client))
                    except Exception as error:
                        answer.set_exception(error)
                    except BaseException:  # the transport failed and cancels the call
                        answer.set_exception(ConnectionError("the MCP server ended the connection"))
                        raise
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(ConnectionError(_cause(error)))
        finally:
            while not self._jobs.empty():
                if (left := self._jobs.get_nowait()) is not None:
                    left[1].set_exception(ConnectionError("the MCP server ended the connection"))
            with contextlib.suppress(Exception):
                await asyncio.sleep(0)


def _cause(error: BaseException) -> str:
    """Return the first error inside a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
