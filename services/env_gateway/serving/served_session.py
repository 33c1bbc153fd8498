"""One session with an environment, as other protocols see it: a prompt, tools, results, and a reward at the end.

Those protocols have no message without a tool call, so a tool of ours carries it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from palimpsest.common.control.errors import HttpError
from palimpsest.common.environments.message_tool import MESSAGE_ARGUMENT, MESSAGE_TOOL
from palimpsest.common.environments.port import tool
from palimpsest.common.sessions.sessions import Sessions
from palimpsest.common.sessions.wire import (
    CreateSession,
    MessageAction,
    Session,
    Status,
    Step,
    TakeStep,
    ToolCall,
    ToolCallsAction,
)

OVER = "The task is over."


class ServedSessionFailed(Exception):
    """The session cannot begin or continue; its reward is unknown. The text is a sentence."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as other protocols describe it."""

    name: str
    description: str
    schema: Mapping[str, Any]
    """JSON schema of its arguments."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a call."""

    text: str
    reward: float | None = None
    """In [0, 1]; set if the call ended the session."""
    success: bool | None = None

    @property
    def done(self) -> bool:
        """Whether the call ended the session."""
        return self.reward is not None


class ServedSession:
    """A session of `sessions`. Calls are applied one after another."""

    def __init__(self, sessions: Sessions, opened: Session) -> None:
        self.id = opened.session_id
        self.prompt = "\n\n".join(message.content for message in opened.messages)
        self.tools = tools_of(opened.tools)
        self.steps = 0
        self._sessions, self._next, self._ended = sessions, opened.next_step, False
        self._lock = asyncio.Lock()

    @classmethod
    async def begin(cls, sessions: Sessions, environment: str, seed: int) -> Self:
        """Begin the task of this seed. Raises ServedSessionFailed."""
        try:
            created = await sessions.create(CreateSession(environment=environment, seed=seed), None)
        except HttpError as error:
            raise _failed(error) from None
        return cls(sessions, Session.model_validate_json(created))

    @property
    def alive(self) -> bool:
        """Whether the session runs; its lease may have expired."""
        return not self._ended and self._sessions.state(self.id).status is Status.RUNNING

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Call a tool. Raises ServedSessionFailed."""
        own = name == MESSAGE_TOOL and next(one for one in self.tools if one.name == name) is _MESSAGE
        if own and not isinstance(arguments.get("text"), str):
            return Result(f"{MESSAGE_TOOL} needs `text`, a text")
        async with self._lock:
            if own:
                action: Any = MessageAction(type="message", content=arguments["text"])
            else:
                action = ToolCallsAction(type="tool_calls", calls=(ToolCall(name=name, arguments=dict(arguments)),))
            return self._result(await self._step(TakeStep(step=self._next, action=action)))

    async def finish(self) -> Result:
        """Score the current state. Raises ServedSessionFailed."""
        async with self._lock:
            try:
                return self._result(Step.model_validate_json(await self._sessions.finalize(self.id)))
            except HttpError as error:
                raise _failed(error) from None

    def keep(self) -> None:
        """Renew the lease of the session. Raises ServedSessionFailed."""
        try:
            self._sessions.heartbeat(self.id)
        except HttpError as error:
            raise _failed(error) from None

    def close(self) -> None:
        """End the session."""
        self._ended = True
        self._sessions.close(self.id)

    async def _step(self, taken: TakeStep) -> Step:
        try:
            return Step.model_validate_json(await self._sessions.step(self.id, taken))
        except HttpError as error:
            raise _failed(error) from None

    def _result(self, step: Step) -> Result:
        self._next, self.steps = step.step + 1, self.steps + 1
        if not step.status.is_terminal:
            return Result("\n".join(message.content for message in step.messages))
        self._ended = True
        if step.reward is None:
            message = step.error.message if step.error else f"the session ended as {step.status}"
            raise ServedSessionFailed(message, step.error.code if step.error else step.status.value)
        return Result(OVER, step.reward, step.success)


_MESSAGE = Tool(
    MESSAGE_TOOL,
    "Send a message without a tool call: the final answer, or an answer to the user.",
    tool(MESSAGE_TOOL, "", **{MESSAGE_ARGUMENT: "The message."})["function"]["parameters"],
)


def tools_of(schemas: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return the tools of an opening, and the one that sends a message unless there is a tool of its name."""
    found = []
    for schema in schemas:
        body = schema.get("function", schema)
        parameters = body.get("parameters") or {"type": "object", "properties": {}}
        found.append(Tool(str(body["name"]), str(body.get("description") or body["name"]), parameters))
    return found if any(one.name == MESSAGE_TOOL for one in found) else [*found, _MESSAGE]


def _failed(error: HttpError) -> ServedSessionFailed:
    return ServedSessionFailed(str(error.body["message"]), str(error.body["code"]))
