"""The sessions that agent programs have open, by key, and what a program may do with one."""

import asyncio
import json
import math
import secrets
from collections.abc import Mapping
from typing import Any, TypeGuard

from palimpsest.common.environments.tool_calls import render
from palimpsest.common.sessions.port import EnvironmentSessions, SessionFailed
from palimpsest.common.sessions.wire import Session, Step
from palimpsest.services.rollout.agents.requests import Completion, ModelRequest, Refused, call_of
from palimpsest.services.rollout.agents.session import AgentSession, Reward


class OpenSession:
    """A session, and its environment if the run names one."""

    def __init__(
        self, session: AgentSession, environment: Session | None, environments: EnvironmentSessions, sample: int
    ) -> None:
        self.session, self.environment, self._environments = session, environment, environments
        self._number, self._next_step = sample, environment.next_step if environment is not None else 0
        self.ended: Step | None = None
        """The environment's last step, if it ended the session."""
        self._turn = asyncio.Lock()

    @property
    def temperature(self) -> float:
        """The temperature of the run."""
        return self.session.group.sampling.temperature

    async def ask(self, request: ModelRequest, key: str) -> "asyncio.Task[Completion]":
        """Begin to sample the next model message. Raises Refused."""
        return self.session.replay(key) or self.session.start(self.session.prepare(request), key)

    async def task(self) -> dict[str, Any]:
        """Return the task of the session."""
        group, environment = self.session.group, self.environment
        return {
            "environment": group.environment,
            "seed": group.task_seed,
            "sample": self._number,
            "messages": [message.model_dump() for message in environment.messages] if environment is not None else [],
            "tools": list(environment.tools) if environment is not None else [],
            "scored_by": "program" if environment is None else "environment",
        }

    async def step(self, body: Any) -> dict[str, Any]:
        """Take a step in the environment. body: `text`, or `calls` with name and arguments each. Raises Refused."""
        if self.environment is None:
            raise Refused("this session has no environment: post the reward", status=404, code="no_environment")
        text = _text(body)
        async with self._turn:
            if self.ended is not None:
                raise Refused("the environment has ended the session", status=409, code="session_ended")
            try:
                step = await self._environments.step(self.environment.session_id, self._next_step, text)
            except SessionFailed as error:
                self.session.fail(error)
                raise Refused(str(error), status=409, code="environment_failed") from None
            self._next_step = step.step + 1
            if step.status.is_terminal:
                self.ended = step
        return {
            "ended": step.status.is_terminal,
            "status": step.status.value,
            "messages": [message.model_dump() for message in step.messages],
        }

    async def post_reward(self, body: Any) -> dict[str, Any]:
        """Take the reward of the program, which ends the session. Raises Refused."""
        if self.environment is not None:
            raise Refused("the environment of this session gives the reward", status=403, code="scored_elsewhere")
        if not isinstance(body, Mapping) or set(body) - {"reward", "success", "parts"}:
            raise Refused("the body must have `reward`, and may have `success` and `parts`")
        reward, parts = body.get("reward"), body.get("parts") or {}
        if not _is_number(reward) or not 0 <= reward <= 1:
            raise Refused(f"`reward` is {reward!r}; it must be a number in [0, 1]", param="reward")
        if not isinstance(parts, Mapping) or not all(_is_number(value) for value in parts.values()):
            raise Refused("`parts` must hold numbers", param="parts")
        success = body.get("success", reward >= 1)
        if not isinstance(success, bool):
            raise Refused("`success` must be true or false", param="success")
        if self.session.reward.done():
            raise Refused("the session has ended", status=409, code="session_ended")
        self.session.reward.set_result(Reward(float(reward), success, {k: float(v) for k, v in parts.items()}))
        return {"ended": True}

    async def finalize(self) -> Step | None:
        """Return the environment's score of the session; None without an environment. Raises SessionFailed."""
        if self.environment is None or self.ended is not None:
            return self.ended
        return await self._environments.finalize(self.environment.session_id)

    async def renew(self) -> None:
        """Renew the lease of the environment's session. Raises SessionFailed."""
        if self.environment is not None and self.ended is None:
            await self._environments.heartbeat(self.environment.session_id)


class OpenSessions:
    """The open sessions, by key. The worker's event loop changes it; a look-up is safe from any thread."""

    def __init__(self) -> None:
        self._open: dict[str, OpenSession] = {}

    def add(self, session: OpenSession) -> str:
        """Return the key of a new session."""
        key = f"session-{secrets.token_urlsafe(24)}"
        self._open[key] = session
        return key

    def remove(self, key: str) -> None:
        """Forget a session."""
        self._open.pop(key, None)

    def of(self, key: str) -> OpenSession:
        """Return the session of a key. Raises Refused."""
        found = self._open.get(key)
        if found is None:
            raise Refused(
                "the key is not of an open session: a program gets its key in OPENAI_API_KEY and ANTHROPIC_API_KEY",
                status=401,
                code="unknown_session",
            )
        return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(body: Any) -> str:
    """Return a step as the text that a model would write. Raises Refused."""
    if isinstance(body, Mapping) and isinstance(body.get("text"), str) and set(body) == {"text"}:
        return str(body["text"])
    sent = body["calls"] if isinstance(body, Mapping) and set(body) == {"calls"} else None
    if isinstance(sent, list) and sent and all(isinstance(one, Mapping) for one in sent):
        calls = [call_of(one.get("name"), one.get("arguments")) for one in sent]
        return "\n".join(render(one.name, json.loads(one.arguments)) for one in calls)
    raise Refused("the body must have either `text` or `calls`, a list of objects with `name` and `arguments`")
