"""Evaluates a model folder on held-out tasks with one engine, outside of any run."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.session_environments import agent_programs
from palimpsest.common.evaluation.estimates import EnvironmentResult
from palimpsest.common.evaluation.tasks import HeldOutTask
from palimpsest.common.messages import GroupOffered, Sampling, TrajectoryFinished, trajectory_id
from palimpsest.common.sessions.in_process import InProcessSessions
from palimpsest.common.sessions.registry import Registry
from palimpsest.common.sessions.sessions import Sessions, limits_of
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.held_output import HeldOutput
from palimpsest.services.learner.evaluation.ledger import EvaluationLedger
from palimpsest.services.learner.evaluation.state import SCORED, SampleEnd
from palimpsest.services.rollout.agents.endpoints import serving
from palimpsest.services.rollout.agents.runner import AgentRunner
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.build import build_engine
from palimpsest.services.rollout.engine.port import Engine, EngineDead, SampledTokens, Span, StoredWeights
from palimpsest.services.rollout.trajectory_sampler import Tally, TrajectorySampler

NAME = "eval"
"""Name of the only worker."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of `palimpsest eval`."""

    results: dict[str, EnvironmentResult]
    counts: dict[str, int | dict[str, int]]
    sampled_tokens: int
    seconds: float


class StatedVersion:
    """An engine that never loads other weights: all of its tokens are of one version."""

    def __init__(self, engine: Engine, version: Version) -> None:
        self._engine, self._version = engine, version

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        """See Engine."""
        sampled = await self._engine.generate(
            prompt, request=request, temperature=temperature, max_tokens=max_tokens, stop=stop
        )
        spans = (Span(self._version, 0, len(sampled.tokens)),) if sampled.tokens else ()
        return SampledTokens(sampled.tokens, sampled.logprobs, spans, stopped=sampled.stopped)

    def status(self) -> dict[str, str]:
        """See Engine."""
        return self._engine.status()

    async def start(self) -> None:
        """See Engine."""
        await self._engine.start()

    async def watch(self) -> NoReturn:
        """See Engine."""
        await self._engine.watch()

    async def pause(self) -> None:
        """See Engine."""
        await self._engine.pause()

    async def partial(self, request: str) -> SampledTokens | None:
        """See Engine."""
        return await self._engine.partial(request)

    async def sleep(self) -> None:
        """See Engine."""
        await self._engine.sleep()

    async def load(self, weights: StoredWeights) -> None:
        """See Engine."""
        await self._engine.load(weights)

    async def resume(self) -> None:
        """See Engine."""
        await self._engine.resume()

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """See Engine."""
        return await self._engine.score(tokens)

    async def close(self) -> None:
        """See Engine."""
        await self._engine.close()


def evaluate(
    config: RunConfig,
    registry: Registry,
    tasks: Sequence[HeldOutTask],
    *,
    version: Version,
    manifest: Manifest | None,
    samples: int,
    temperature: float,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Evaluated:
    """Sample every task and return the estimates. Raises UserError.

    registry: the environments. manifest: of the version, which the scripted engine needs. progress: called with the
    number of ended trajectories and of all.
    """
    with HeldOutput() as held:
        return asyncio.run(
            _evaluate(
                config, registry, tasks, version=version, manifest=manifest, samples=samples, temperature=temperature,
                progress=progress, held=held,
            )
        )  # fmt: skip


async def _evaluate(
    config: RunConfig,
    registry: Registry,
    tasks: Sequence[HeldOutTask],
    *,
    version: Version,
    manifest: Manifest | None,
    samples: int,
    temperature: float,
    progress: Callable[[int, int], None],
    held: HeldOutput,
) -> Evaluated:
    dialogue = ChatRenderer.load(
        config.model.path, dict(config.model.chat_template_options), config.model.chat_template
    )
    limit = trajectory_limit(config).tokens
    sampling = Sampling(
        temperature=temperature,
        max_turn_tokens=config.sampling.max_turn_tokens,
        max_trajectory_tokens=limit,
        max_turns=config.sampling.max_turns,
    )
    engine = StatedVersion(build_engine(config, dialogue, limit), version)
    ledger, tally = EvaluationLedger(version, tasks, samples=samples), Tally()
    offers = [_offer(group, ledger, sampling, samples, number) for number, group in enumerate(ledger.groups())]
    try:
        with held.holding():
            await engine.start()
        if manifest is not None:  # the scripted engine samples only with weights
            await engine.pause()
            await engine.load(StoredWeights(manifest, Path()))
            await engine.resume()
        began = time.monotonic()
        async with AsyncExitStack() as opened:
            sessions = await opened.enter_async_context(InProcessSessions(Sessions(registry, limits_of(config))))
            agents = AgentRunner(agent_programs(config, *{task.environment for task in tasks}), sessions)
            if config.rollout.agents:
                opened.enter_context(serving(agents))
            sampler = TrajectorySampler(
                NAME, engine, sessions, dialogue, config.rollout.attempts, tally, _verified, agents=agents
            )
            work = asyncio.create_task(_sample_all(sampler, offers, ledger, config.rollout.max_live, progress))
            watching = asyncio.create_task(engine.watch())
            try:
                await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    watching.result()
                work.result()
            finally:
                for task in (work, watching):
                    task.cancel()
                await asyncio.gather(work, watching, return_exceptions=True)
    except* EngineDead as errors:
        raise UserError(str(errors.exceptions[0]), ExitCode.ENGINE) from None
    finally:
        with held.holding():
            await engine.close()
    return Evaluated(ledger.results(), ledger.counts(), tally.sampled_tokens, time.monotonic() - began)


async def _sample_all(
    sampler: TrajectorySampler,
    offers: Sequence[GroupOffered],
    ledger: EvaluationLedger,
    max_live: int,
    progress: Callable[[int, int], None],
) -> None:
    """Sample all trajectories, at most `max_live` at a time, and enter their ends."""
    slots, total = asyncio.Semaphore(max_live), sum(offer.samples for offer in offers)

    async def sample(offer: GroupOffered, number: int) -> None:
        async with slots:
            ended = await sampler.sample(offer, number)
        if isinstance(ended, TrajectoryFinished):
            end = SampleEnd(SCORED, ended.success, ended.reward)
        else:
            end = SampleEnd(ended.reason.value)
        ledger.end(trajectory_id(offer.group, number), end)
        progress(total - ledger.pending, total)

    async with asyncio.TaskGroup() as group:
        for offer in offers:
            for number in range(offer.samples):
                group.create_task(sample(offer, number))


def _offer(group: str, ledger: EvaluationLedger, sampling: Sampling, samples: int, number: int) -> GroupOffered:
    task = ledger.task(group)
    assert task is not None
    return GroupOffered(
        run=NAME,
        group=group,
        index=number,
        version=ledger.version,
        environment=task.environment,
        task_seed=task.seed,
        samples=samples,
        sampling=sampling,
        time_limit_s=float("inf"),
        evaluation=True,
    )


async def _verified(_: Version) -> None:
    """The engine has one version."""
