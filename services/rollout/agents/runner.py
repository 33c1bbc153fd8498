"""Runs agent programs: a session, a process, a reward, and one record with all token sequences of the session."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from palimpsest.common.config.agents import AgentConfig
from palimpsest.common.messages import Ending, GroupOffered
from palimpsest.common.sessions.port import EnvironmentSessions, SessionFailed
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step
from palimpsest.services.rollout.agents.open_sessions import OpenSession, OpenSessions
from palimpsest.services.rollout.agents.program import END_S, Program, running
from palimpsest.services.rollout.agents.session import AgentSession, Reward, SessionBudget
from palimpsest.services.rollout.lease_renewal import with_renewals

VERSION = "agent"
"""environment_version of a session without an environment."""
NEVER_S = 3600.0
"""Interval of renewals of a session without an environment, in seconds."""


class AgentFailed(SessionFailed):
    """The program died, took too long, or ended without a reward: the reward is unknown."""


@dataclass(frozen=True, slots=True)
class AgentResult:
    """A finished session."""

    reward: float
    success: bool
    parts: dict[str, float]
    ending: Ending
    environment_version: str


class AgentRunner:
    """The agents of `rollout.agents`."""

    def __init__(self, agents: Mapping[str, AgentConfig], environments: EnvironmentSessions) -> None:
        self._agents, self._environments = agents, environments
        self.open = OpenSessions()
        self.address = ""
        """URL of the endpoints, without a path; set when they listen."""
        self._places = {name: asyncio.Semaphore(config.max_processes) for name, config in agents.items()}

    def runs(self, name: str) -> bool:
        """Return whether a program plays the tasks of this environment."""
        return name in self._agents

    def limits(self, name: str) -> SessionBudget:
        """Return the budget of a session."""
        return SessionBudget(self._agents[name].max_calls, self._agents[name].max_sampled_tokens)

    async def play(self, session: AgentSession, sample: int, *, key: str) -> AgentResult:
        """Run the program of a session to its end. key: see EnvironmentSessions.create.

        Raises AgentFailed, SessionFailed, and what the engine raised. The session is then still in flight; call
        `session.take_live`.
        """
        group = session.group
        config = self._agents[group.environment]
        limit_s = min(config.time_limit_s or group.time_limit_s, group.time_limit_s)
        async with self._places[group.environment]:
            environment = await self._begin(config, group, key)
            opened = OpenSession(session, environment, self._environments, sample)
            name = self.open.add(opened)
            try:
                return await self._play(config, opened, name, limit_s)
            finally:
                self.open.remove(name)
                if environment is not None:
                    with suppress(SessionFailed):
                        await self._environments.close(environment.session_id)

    async def _begin(self, config: AgentConfig, group: GroupOffered, key: str) -> Session | None:
        if not config.environment:
            return None
        request = CreateSession(environment=config.environment, seed=group.task_seed, group=group.group)
        return await self._environments.create(request, idempotency_key=key, capacity_s=group.time_limit_s)

    async def _play(self, config: AgentConfig, opened: OpenSession, key: str, limit_s: float) -> AgentResult:
        session = opened.session
        try:
            async with running(config.command, self._variables(opened, key), named=config.variables) as program:
                waiting = _end_of(program, session, limit_s)
                lease_s = NEVER_S if opened.environment is None else opened.environment.lease_expires_in_s
                posted = await with_renewals(waiting, opened.renew, lease_s=lease_s)
                await program.end(grace_s=END_S)
        except OSError as error:
            raise AgentFailed(
                "agent_failed", f"rollout.agents: {config.command[0]} cannot be started: {error}"
            ) from None
        step = await opened.finalize()
        return _result(posted, step, opened.environment)

    def _variables(self, opened: OpenSession, key: str) -> dict[str, str]:
        group = opened.session.group
        task = {"environment": group.environment, "seed": group.task_seed, "trajectory": opened.session.trajectory}
        return {
            "OPENAI_BASE_URL": f"{self.address}/v1",
            "OPENAI_API_KEY": key,
            "ANTHROPIC_BASE_URL": self.address,
            "ANTHROPIC_API_KEY": key,
            "AGENT_SESSION_URL": f"{self.address}/v1/session",
            "AGENT_TASK": json.dumps(task),
            "NO_PROXY": "127.0.0.1,localhost",
        }


async def _end_of(program: Program, session: AgentSession, limit_s: float) -> Reward | None:
    """Wait for the reward, or for the program to end with code 0. Raises AgentFailed, or the session's error."""
    exited = asyncio.create_task(program.wait())
    try:
        async with asyncio.timeout(limit_s):
            either: list[asyncio.Future[Any]] = [exited, session.reward]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if session.reward.done():
                return session.reward.result()
            if code := exited.result():
                how = f"code {code}" if code > 0 else f"signal {-code}"
                raise AgentFailed("agent_died", f"the program ended with {how}: {program.last_output or 'no output'}")
            return None
    except TimeoutError:
        raise AgentFailed("agent_timeout", f"the program did not end within {limit_s:g} s") from None
    finally:
        exited.cancel()


def _result(posted: Reward | None, step: Step | None, environment: Session | None) -> AgentResult:
    """Return the result without its sequences. Raises SessionFailed if the reward is unknown."""
    version = environment.environment_version if environment is not None else VERSION
    if environment is None:
        if posted is None:
            raise AgentFailed("agent_died", "the program ended without a reward: it must post one")
        return AgentResult(posted.reward, posted.success, posted.parts, Ending.TERMINATED, version)
    assert step is not None
    if step.reward is None or step.success is None:
        message = step.error.message if step.error else f"the session ended as {step.status} without a reward"
        raise SessionFailed(step.error.code if step.error else step.status.value, message)
    ending = Ending.TERMINATED if step.status is Status.TERMINATED else Ending.TRUNCATED
    return AgentResult(step.reward, step.success, dict(step.reward_parts), ending, version)
