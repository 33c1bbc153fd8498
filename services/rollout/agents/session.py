"""A session of an agent program: its token sequences, its budget, and its end.

All methods run on the worker's event loop.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from palimpsest.common.branches import branch_name
from palimpsest.common.environments.tool_calls import END_THINK, read
from palimpsest.common.messages import GroupOffered
from palimpsest.common.versions import Version
from palimpsest.services.rollout import instruments
from palimpsest.services.rollout.agents.conversation import ChatMessage, Mark, TokenSequence, call, find
from palimpsest.services.rollout.agents.requests import Completion, DeliveredCall, ModelRequest, Refused
from palimpsest.services.rollout.chat_renderer import ChatRenderer, RenderFailed
from palimpsest.services.rollout.engine.port import SampledTokens
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory, TrajectoryBuilder

Sample = Callable[[InFlightTrajectory, int], Awaitable[SampledTokens]]
"""Samples a message that continues the trajectory in at most so many tokens, and adds it."""


@dataclass(frozen=True, slots=True)
class SessionBudget:
    """The budget of a session."""

    calls: int
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Reward:
    """What the program posted."""

    reward: float
    success: bool
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Pending:
    """A request that was accepted; its message is not sampled yet."""

    request: ModelRequest
    sequence: TokenSequence
    room: int


class AgentSession:
    """One session. `live`: the worker's trajectories in flight, which a cut flushes."""

    def __init__(
        self,
        group: GroupOffered,
        trajectory: str,
        attempt: int,
        *,
        dialogue: ChatRenderer,
        sample: Sample,
        live: list[InFlightTrajectory],
        limits: SessionBudget,
    ) -> None:
        self.group, self.trajectory, self._attempt = group, trajectory, attempt
        self._dialogue, self._sample, self._live, self._limits = dialogue, sample, live, limits
        self.sequences: list[TokenSequence] = []
        self.calls = self.sampled_tokens = 0
        self.reward: asyncio.Future[Reward] = asyncio.get_running_loop().create_future()
        """The reward that the program posts, or the error that ends the session."""
        self._replies: dict[str, asyncio.Task[Completion]] = {}
        self._tasks: set[asyncio.Task[Completion]] = set()
        self._closed = False

    def prepare(self, request: ModelRequest) -> Pending:
        """Find the sequence that the request continues, or begin one, and add its messages. Raises Refused."""
        if self._closed or self.reward.done():
            raise Refused("the session has ended", status=409, code="session_ended")
        tokens_left = self._limits.sampled_tokens - self.sampled_tokens
        if self.calls >= self._limits.calls or tokens_left < 1:
            raise Refused(
                f"the session has had {self.calls} model messages and {self.sampled_tokens} sampled tokens; its limits "
                f"are {self._limits.calls} and {self._limits.sampled_tokens}",
                status=403,
                code="budget_exhausted",
            )
        tools = json.dumps(request.tools, sort_keys=True)
        place = find(self.sequences, tools, request.messages)
        try:
            prefix, added = self._render(request, place)
        except RenderFailed as error:
            raise Refused(str(error), code="unsupported_messages", param="messages") from None
        sampling = self.group.sampling
        room = sampling.max_trajectory_tokens - len(prefix) - len(added)
        if room < 1:
            raise Refused(
                f"the conversation has {len(prefix) + len(added)} tokens; sampling.max_trajectory_tokens is "
                f"{sampling.max_trajectory_tokens}",
                code="context_length_exceeded",
                param="messages",
            )
        if place is not None and place.continues:
            sequence = place.sequence
            sequence.live.assembly.add_environment(added)
            instruments.AGENT_MESSAGES.labels("continued").inc()
        else:
            sequence = self._begin((*prefix, *added), tools, place.mark if place is not None else None)
        sequence.history, sequence.busy = list(request.messages), True
        self.calls += 1
        return Pending(request, sequence, min(room, sampling.max_turn_tokens, tokens_left, request.max_tokens or room))

    def start(self, pending: Pending, key: str = "") -> "asyncio.Task[Completion]":
        """Begin to sample. key: a later request with this key gets the same message."""
        task = asyncio.create_task(self._complete(pending))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if key:
            self._replies[key] = task
        return task

    def replay(self, key: str) -> "asyncio.Task[Completion] | None":
        """Return the message of an earlier request with this key: a client repeats a request whose reply it lost."""
        return self._replies.get(key) if key else None

    def fail(self, error: BaseException) -> None:
        """End the session with an error."""
        if not self.reward.done():
            self.reward.set_exception(error)

    async def close(self, verified: Callable[[Version], Awaitable[None]]) -> None:
        """Serve no further request, and wait until all its tokens are of verified versions."""
        await self.cancel()
        versions = [one.version for sequence in self.sequences for one in sequence.live.assembly.segments]
        if versions:
            await verified(max(versions))

    async def cancel(self) -> None:
        """Serve no further request, and abort those in flight."""
        self._closed = True
        waiting = tuple(self._tasks)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if not self.reward.done():
            self.reward.cancel()
        elif not self.reward.cancelled():
            self.reward.exception()  # marks it as seen

    def take_live(self) -> tuple[tuple[int, TrajectoryBuilder], ...]:
        """Remove the session from the trajectories in flight. Return number and content of each sequence with a sampled
        token, without tokens after its last one."""
        for sequence in self.sequences:
            self._live.remove(sequence.live)
        return tuple(
            (one.number, one.live.assembly.until_last_sampled()) for one in self.sequences if one.live.assembly.segments
        )

    def _render(self, request: ModelRequest, place: Any) -> tuple[list[int], tuple[int, ...]]:
        """Return the tokens that the request continues from, and those of its further messages."""
        if place is None:
            return [], self._dialogue.begin(_plain(request.messages), request.tools)
        further = _plain(request.messages[place.mark.messages :])
        added = self._dialogue.render_turn_separator(further, ended_by=place.mark.ended_by)
        return place.sequence.live.assembly.tokens[: place.mark.tokens], added

    def _begin(self, prompt: Iterable[int], tools: str, mark: Mark | None) -> TokenSequence:
        number = len(self.sequences)
        instruments.AGENT_MESSAGES.labels("branched" if number else "first").inc()
        name = branch_name(self.trajectory, number)
        live = InFlightTrajectory(self.group, name, self._attempt, TrajectoryBuilder(list(prompt)))
        sequence = TokenSequence(number, live, tools, [], [] if mark is None else [mark])
        self.sequences.append(sequence)
        self._live.append(live)
        return sequence

    async def _complete(self, pending: Pending) -> Completion:
        sequence, request = pending.sequence, pending.request
        prompt_tokens = len(sequence.live.assembly.tokens)
        try:
            sampled = await self._sample(sequence.live, pending.room)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.fail(error)
            raise
        finally:
            sequence.busy = False
        self.sampled_tokens += len(sampled.tokens)
        name = f"{sequence.live.trajectory.replace('/', '-')}-{len(sequence.marks)}"
        text = self._dialogue.text(sampled.tokens)
        done = _delivered(text, request, sampled, id=name, prompt_tokens=prompt_tokens)
        calls = tuple(one.call for one in done.calls)
        sequence.history = [*request.messages, ChatMessage("assistant", done.content, calls)]
        ended_by = sampled.tokens[-1] if sampled.stopped else None
        sequence.marks.append(Mark(len(sequence.history), len(sequence.live.assembly.tokens), ended_by))
        return done


def _plain(messages: Iterable[ChatMessage]) -> tuple[Any, ...]:
    return tuple(message.plain() for message in messages)


def _delivered(text: str, request: ModelRequest, sampled: SampledTokens, *, id: str, prompt_tokens: int) -> Completion:  # noqa: A002
    """Return the message as delivered. Its reasoning is left out. A message that a limit truncated, or with a malformed
    call, is delivered as text: no program should run half a call."""
    turn = read(text)
    calls: tuple[DeliveredCall, ...] = ()
    content = text.partition(END_THINK)[2] if END_THINK in text else text
    if request.tools and sampled.stopped and turn.attempts and len(turn.calls) == len(turn.attempts):
        content = turn.text
        calls = tuple(
            DeliveredCall(f"call-{id}-{place}", call(one.name, one.arguments)) for place, one in enumerate(turn.calls)
        )
    return Completion(id, content, calls, sampled.stopped, prompt_tokens, len(sampled.tokens), request)
