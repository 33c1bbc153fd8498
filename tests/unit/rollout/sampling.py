"""A sampler with a gateway, and an engine that returns given messages."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from palimpsest.common.environments.port import EnvironmentFailed
from palimpsest.common.messages import GroupOffered, Sampling
from palimpsest.common.service import Server
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.hosts import AtCapacity, EnvironmentHost
from palimpsest.common.sessions.registry import Entry
from palimpsest.common.sessions.sessions import SessionLimits, Sessions
from palimpsest.common.versions import Version
from palimpsest.services.env_gateway.app import create_app
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import SampledTokens, Span
from palimpsest.services.rollout.trajectory_sampler import Ended, Tally, TrajectorySampler
from tests.processes.waiting import LIMIT_S

SAMPLING = Sampling(temperature=0.7, max_turn_tokens=120, max_trajectory_tokens=1000, max_turns=6)
BROKEN = EnvironmentFailed("environment_raised", "ValueError: no")


@dataclass(frozen=True)
class NextMessage:
    """The next model message."""

    tokens: Sequence[int]
    stopped: bool = True
    versions: Sequence[int] = ()
    """Of each token; all 0 by default."""

    def sampled(self, max_tokens: int, stop: Sequence[int]) -> SampledTokens:
        """Return the message as an engine does."""
        tokens = (*self.tokens, *(stop[:1] if self.stopped else ()))[:max_tokens]
        versions = [*self.versions, *[max(self.versions, default=0)] * len(tokens)][: len(tokens)]
        cuts = [0, *(i for i in range(1, len(tokens)) if versions[i] != versions[i - 1]), len(tokens)]
        spans = tuple(Span(Version(versions[start]), start, end) for start, end in pairwise(cuts))
        logprobs = tuple(-(1 + i) / 64 for i in range(len(tokens)))
        return SampledTokens(tokens, logprobs, spans, stopped=tokens[-1:] == tuple(stop[:1]))


@dataclass
class MessageEngine:
    """An engine that returns given messages and records its prompts."""

    sayings: Iterable[NextMessage | Exception]
    prompts: list[list[int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[SampledTokens] = field(default_factory=list)
    asked: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rest: Iterator[NextMessage | Exception] = iter(self.sayings)

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        self.prompts.append(list(prompt))
        self.requests.append(request)
        self.asked.append((temperature, max_tokens))
        saying = next(self._rest)
        if isinstance(saying, Exception):
            raise saying
        self.answers.append(saying.sampled(max_tokens, stop))
        return self.answers[-1]


@dataclass
class Setting:
    """Dependencies of a trajectory other than the engine."""

    url: str
    dialogue: ChatRenderer

    async def sample(
        self, engine: MessageEngine, *, environment: str = "lookup", seed: int = 3, sampling: Sampling = SAMPLING,
        trusted: Callable[[Version], Awaitable[None]] | None = None, attempts: int = 3,
    ) -> Ended:  # fmt: skip
        sampler = self.sampler(engine, trusted=trusted, attempts=attempts)
        async with asyncio.timeout(LIMIT_S), sampler.sessions:
            ended = await sampler.sample(self.group(environment, seed, sampling), 2)
            assert sampler.tally.sampled_tokens == sum(len(answer.tokens) for answer in engine.answers)
            return ended

    def sampler(
        self, engine: MessageEngine, *, trusted: Callable[[Version], Awaitable[None]] | None = None, attempts: int = 3
    ) -> TrajectorySampler:
        """Return a sampler; the caller opens its sessions."""
        sessions = SessionClient(self.url, timeout_s=LIMIT_S, connections=4)
        return TrajectorySampler("worker-0", engine, sessions, self.dialogue, attempts, Tally(), trusted or _at_once)  # type: ignore[arg-type]

    def group(self, environment: str, seed: int, sampling: Sampling) -> GroupOffered:
        return GroupOffered(
            run="test", group="g000007", index=7, version=Version(0), environment=environment, task_seed=seed,
            samples=4, sampling=sampling, time_limit_s=600.0,
        )  # fmt: skip

    def engine_of(self, *texts: str) -> MessageEngine:
        """Return an engine that samples these texts."""
        return MessageEngine([NextMessage(self.dialogue.encode(text)) for text in texts])


async def _at_once(version: Version) -> None:
    pass


@contextmanager
def gateway_of(dialogue: ChatRenderer, *opened: EnvironmentHost | EnvironmentFailed | AtCapacity) -> Iterator[Setting]:
    """Run a gateway with one environment, `fake`, whose sessions use these hosts in turn."""
    rest = iter(opened)

    async def open_next() -> EnvironmentHost:
        world = next(rest)
        if isinstance(world, Exception):
            raise world
        return world

    offered = {"fake": Entry("fake", "7", "", False, open_next)}
    app = create_app(Sessions(offered, SessionLimits(10, 600.0, 600.0, 1000)), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        yield Setting(f"http://127.0.0.1:{server.port}", dialogue)
