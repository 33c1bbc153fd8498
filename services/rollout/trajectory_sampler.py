"""Samples one trajectory: start a session, alternate model messages and environment steps, build the record."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from palimpsest.common import failpoints
from palimpsest.common.branches import sequences
from palimpsest.common.logs import logger
from palimpsest.common.messages import (
    DropReason,
    Ending,
    GroupOffered,
    TrajectoryDropped,
    TrajectoryFinished,
    trajectory_id,
)
from palimpsest.common.sessions.port import CAPACITY, EnvironmentSessions, SessionFailed
from palimpsest.common.sessions.wire import CreateSession, Session, Status, Step
from palimpsest.common.versions import Version
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.agents.record import finished_record
from palimpsest.services.rollout.agents.runner import AgentRunner
from palimpsest.services.rollout.agents.session import AgentSession
from palimpsest.services.rollout.chat_renderer import ChatRenderer, RenderFailed
from palimpsest.services.rollout.engine.port import Engine, EngineFailed, SampledTokens
from palimpsest.services.rollout.lease_renewal import Later, call_later, with_renewals
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder

Ended = TrajectoryFinished | TrajectoryDropped
T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """Totals over a worker's trajectories."""

    sampled_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrajectorySampler:
    """Samples the trajectories of one worker."""

    worker: str
    engine: Engine
    sessions: EnvironmentSessions
    dialogue: ChatRenderer
    attempts: int
    tally: Tally
    wait_verified: Callable[[Version], Awaitable[None]]
    """Returns once the canaries have verified this version."""
    live: list[InFlightTrajectory] = field(default_factory=list)
    """Trajectories in flight, oldest first. An id can occur twice, if a task was delivered again."""
    requests: set[str] = field(default_factory=set)
    """The engine's request ids of the messages in flight."""
    agents: AgentRunner | None = None
    """Plays the tasks of agent programs."""
    later: Later = call_later
    """Makes the next renewal of a session's lease after a number of seconds."""

    async def sample(self, group: GroupOffered, sample: int) -> Ended:
        """Sample one trajectory of the group; after a failed session or engine request, start over (see `attempts`).

        Raises EngineDead: the trajectory has no result, and its task must be sampled again.
        """
        name = trajectory_id(group.group, sample)
        reason, failure = DropReason.ENVIRONMENT_FAILED, ""
        for attempt in range(self.attempts):
            try:
                if self.agents is not None and self.agents.runs(group.environment):
                    return await self._agent_attempt(self.agents, group, sample, attempt)
                return await self._attempt(group, name, attempt)
            except SessionFailed as error:
                instruments.ATTEMPTS_FAILED.labels(error.code).inc()
                logger().warning("session failed", trajectory=name, attempt=attempt, error=str(error))
                reason, failure = DropReason.ENVIRONMENT_FAILED, str(error)
                if error.code == CAPACITY:  # it waited for the group's time limit
                    break
            except EngineFailed as error:
                instruments.ATTEMPTS_FAILED.labels(DropReason.ENGINE_FAILED.value).inc()
                logger().warning("engine failed", trajectory=name, attempt=attempt, error=str(error))
                reason, failure = DropReason.ENGINE_FAILED, str(error)
            except RenderFailed as error:
                return self._dropped_record(group, name, DropReason.ENVIRONMENT_FAILED, str(error))
            except _UnusableOutput as error:
                return self._dropped_record(group, name, error.reason, str(error))
        return self._dropped_record(group, name, reason, failure)

    async def _attempt(self, group: GroupOffered, name: str, attempt: int) -> Ended:
        request = CreateSession(environment=group.environment, seed=group.task_seed, group=group.group, attempt=attempt)
        key = self._key(group, name, attempt)
        session = await _timed(self.sessions.create(request, idempotency_key=key, capacity_s=group.time_limit_s))
        try:
            assembly = TrajectoryBuilder(self.dialogue.begin(session.messages, session.tools))
        except RenderFailed:
            await self._close(session)
            raise
        live = InFlightTrajectory(group, name, attempt, assembly)
        self.live.append(live)
        try:
            step = await self._dialogue(live, session)
        except (RenderFailed, _UnusableOutput):
            await self._close(session)
            raise
        finally:
            # The caller of `sample` puts the record into the outbox before another coroutine runs. At every cut, the
            # tokens are therefore either in `live` or in the outbox.
            self.live.remove(live)
        failpoints.reach("rollout.before_publish")
        return self._finished_record(live, session, step)

    async def _agent_attempt(self, agents: AgentRunner, group: GroupOffered, sample: int, attempt: int) -> Ended:
        """Let a program drive the model. The record has all token sequences of its session."""
        name = trajectory_id(group.group, sample)
        session = AgentSession(
            group, name, attempt, dialogue=self.dialogue, sample=self._message, live=self.live,
            limits=agents.limits(group.environment),
        )  # fmt: skip
        try:
            result = await agents.play(session, sample, key=self._key(group, name, attempt))
            await session.close(self.wait_verified)
        except BaseException:
            await session.cancel()
            session.take_live()
            raise
        # As in `_attempt`, nothing is awaited from here until the record is in the outbox.
        record = finished_record(session, session.take_live(), result, worker=self.worker, attempt=attempt)
        versions = sorted({segment.version for part in sequences(record) for segment in part.segments})
        if group.evaluation and versions != [group.version]:
            return self._version_passed(group, name, versions)
        failpoints.reach("rollout.before_publish")
        instruments.TRAJECTORIES.labels(record.ending.value).inc()
        return record

    def _key(self, group: GroupOffered, name: str, attempt: int) -> str:
        """Return an idempotency key for a new session."""
        return f"{group.run}/{name}/{attempt}/{self.worker}/{time.monotonic_ns()}"

    async def _close(self, session: Session) -> None:
        """Delete the session of a trajectory that cannot be sampled. If that fails, its lease expires."""
        with suppress(SessionFailed):
            await self.sessions.close(session.session_id)

    async def _dialogue(self, live: InFlightTrajectory, session: Session) -> Step:
        """Alternate turns and environment steps until the environment or a limit ends the trajectory."""
        assembly, sampling, number = live.assembly, live.group.sampling, session.next_step
        room = sampling.max_trajectory_tokens - len(assembly.tokens)
        if room < 1:
            raise _UnusableOutput(
                DropReason.PROMPT_TOO_LONG,
                f"the first observation has {len(assembly.tokens)} tokens, "
                f"but sampling.max_trajectory_tokens is {sampling.max_trajectory_tokens}",
            )
        while True:
            longest = min(sampling.max_turn_tokens, room)
            sampled = await with_renewals(
                self._message(live, longest),
                lambda: self.sessions.heartbeat(session.session_id),
                lease_s=session.lease_expires_in_s,
                later=self.later,
            )
            if not sampled.stopped:
                # A limit truncated the message. Executing half of it would reward calls with arbitrary text after them.
                return await _timed(self.sessions.finalize(session.session_id))
            step = await _timed(self.sessions.step(session.session_id, number, self.dialogue.text(sampled.tokens)))
            if step.status.is_terminal:
                return step
            answer = self.dialogue.render_turn_separator(step.messages, ended_by=sampled.tokens[-1])
            room = sampling.max_trajectory_tokens - len(assembly.tokens) - len(answer)
            if room < 1 or assembly.turns == sampling.max_turns:
                # Leave out the environment's answer if no model message follows: no trajectory exceeds the limit.
                return await _timed(self.sessions.finalize(session.session_id))
            assembly.add_environment(answer)
            number = step.step + 1

    async def _message(self, live: InFlightTrajectory, room: int) -> SampledTokens:
        live.request = request = self._request(live)
        self.requests.add(request)
        try:
            sampled = await self.engine.generate(
                live.assembly.tokens,
                request=request,
                temperature=live.group.sampling.temperature,
                max_tokens=room,
                stop=self.dialogue.stop_tokens,
            )
        finally:
            live.request = None
            self.requests.discard(request)
        live.assembly.add_sampled(sampled)  # without an await, so that a cut finds the tokens here or in the engine
        instruments.TOKENS.inc(len(sampled.tokens))
        self.tally.sampled_tokens += len(sampled.tokens)
        await self.wait_verified(sampled.spans[-1].version)  # tokens of an unverified version never leave the worker
        return sampled

    def _request(self, live: InFlightTrajectory) -> str:
        """Return a name that no other request in flight has."""
        name = f"{live.trajectory}#{live.attempt}.{live.assembly.turns}"
        while name in self.requests:
            name += "+"
        return name

    def _finished_record(self, live: InFlightTrajectory, session: Session, step: Step) -> Ended:
        group, assembly = live.group, live.assembly
        if group.evaluation and any(segment.version != group.version for segment in assembly.segments):
            versions = sorted({segment.version for segment in assembly.segments})
            return self._version_passed(group, live.trajectory, versions)
        if step.reward is None or step.success is None:
            message = step.error.message if step.error else f"the session ended as {step.status} without a reward"
            raise SessionFailed(step.error.code if step.error else step.status.value, message)
        ending = Ending.TERMINATED if step.status is Status.TERMINATED else Ending.TRUNCATED
        instruments.TRAJECTORIES.labels(ending.value).inc()
        return TrajectoryFinished(
            run=group.run,
            trajectory=live.trajectory,
            group=group.group,
            attempt=live.attempt,
            worker=self.worker,
            environment=group.environment,
            environment_version=session.environment_version,
            tokens=assembly.pack(),
            segments=assembly.segments,
            temperature=group.sampling.temperature,
            reward=step.reward,
            reward_parts=step.reward_parts,
            success=step.success,
            ending=ending,
            turns=assembly.turns,
        )

    def _version_passed(self, group: GroupOffered, name: str, versions: list[Version]) -> TrajectoryDropped:
        detail = f"versions {versions} sampled its tokens, but version {group.version} is evaluated"
        return self._dropped_record(group, name, DropReason.VERSION_PASSED, detail)

    def _dropped_record(self, group: GroupOffered, name: str, reason: DropReason, detail: str) -> TrajectoryDropped:
        instruments.TRAJECTORIES.labels(reason.value).inc()
        logger().warning("dropped", trajectory=name, reason=reason.value, detail=detail)
        return TrajectoryDropped(
            run=group.run, trajectory=name, group=group.group, worker=self.worker, reason=reason, detail=detail
        )


class _UnusableOutput(Exception):
    """The trajectory cannot be sampled; another attempt would fail in the same way."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


async def _timed(call: Awaitable[T]) -> T:
    with instruments.ENVIRONMENT_SECONDS.time():
        return await call
