"""Failures of the engine, the gateway, and the environment: retries and drops."""

import asyncio
from dataclasses import replace

import pytest

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.environments import lookup
from palimpsest.common.environments.port import Opening, Reply
from palimpsest.common.messages import DropReason, Sampling, TrajectoryDropped, TrajectoryFinished
from palimpsest.common.sessions import client
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.hosts import AtCapacity
from palimpsest.common.sessions.wire import Message
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed, SampledTokens
from tests.processes.waiting import LIMIT_S
from tests.unit.env_gateway.fakes import HALF, ScriptedWorld, reply
from tests.unit.rollout.chat_models import FAMILIES
from tests.unit.rollout.sampling import BROKEN, SAMPLING, MessageEngine, NextMessage, Setting, gateway_of
from tools.backends.ports import free


async def test_a_request_that_fails_in_every_attempt_drops_the_trajectory(setting: Setting) -> None:
    engine = MessageEngine([EngineFailed(f"request g000007/2#{attempt}.0: lost") for attempt in range(3)])
    ended = await setting.sample(engine)
    assert isinstance(ended, TrajectoryDropped)
    assert (ended.reason, ended.detail) == (DropReason.ENGINE_FAILED, "request g000007/2#2.0: lost")
    assert engine.requests == [f"g000007/2#{attempt}.0" for attempt in range(3)]


async def test_a_request_that_fails_once_is_tried_again(setting: Setting) -> None:
    messages = [NextMessage(setting.dialogue.encode(text)) for text in lookup.solution(3)]
    ended = await setting.sample(MessageEngine([EngineFailed("lost"), *messages]))
    assert isinstance(ended, TrajectoryFinished)
    assert (ended.attempt, ended.success) == (1, True)


def waiting_client(url: str, pauses: list[float]) -> SessionClient:
    """A client whose pauses take no time, but count on its clock."""

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    return SessionClient(url, timeout_s=LIMIT_S, connections=1, clock=lambda: sum(pauses), sleep=sleep)


async def test_a_trajectory_waits_for_a_place_of_the_gateway(dialogue: ChatRenderer) -> None:
    full = [AtCapacity("2 sessions already have their own process")] * (10 * client.TRIES)
    pauses: list[float] = []
    with gateway_of(dialogue, *full, ScriptedWorld(HALF)) as place:
        sampler = place.sampler(MessageEngine([NextMessage([70, 71])]), attempts=1)
        sampler = replace(sampler, sessions=waiting_client(place.url, pauses))
        async with sampler.sessions:
            ended = await sampler.sample(place.group("fake", 3, SAMPLING), 2)
    assert isinstance(ended, TrajectoryFinished)
    assert (ended.attempt, len(pauses)) == (0, len(full))


async def test_a_trajectory_waits_for_a_place_no_longer_than_its_time_limit(dialogue: ChatRenderer) -> None:
    pauses: list[float] = []
    with gateway_of(dialogue, *[AtCapacity("every place is taken")] * 1000) as place:
        sampler = replace(place.sampler(MessageEngine([])), sessions=waiting_client(place.url, pauses))
        group = place.group("fake", 3, SAMPLING)
        async with sampler.sessions:
            ended = await sampler.sample(group, 2)
    assert isinstance(ended, TrajectoryDropped)
    assert (ended.reason, "every place is taken" in ended.detail) == (DropReason.ENVIRONMENT_FAILED, True)
    assert group.time_limit_s - client.LONGEST_PAUSE_S <= sum(pauses) <= group.time_limit_s


async def test_a_dead_engine_drops_no_trajectory(setting: Setting) -> None:
    engine = MessageEngine([EngineDead("the inference engine died of SIGKILL")])
    with pytest.raises(EngineDead, match="died of SIGKILL"):
        await setting.sample(engine)
    assert len(engine.requests) == 1, "no attempt of the same engine can mend it"


@pytest.mark.parametrize("how", ["it is cancelled", "the engine fails", "the session fails"])
async def test_a_failed_trajectory_leaves_the_in_flight_table(
    dialogue: ChatRenderer, setting: Setting, how: str
) -> None:
    with gateway_of(dialogue, ScriptedWorld(BROKEN), ScriptedWorld(BROKEN), ScriptedWorld(BROKEN)) as broken:
        place, environment = (broken, "fake") if how == "the session fails" else (setting, "lookup")
        sayings = [EngineFailed("lost")] * 3 if how == "the engine fails" else [NextMessage([70, 71])] * 3
        engine = MessageEngine(sayings)
        sampler = place.sampler(engine)
        if how == "it is cancelled":
            waiting = asyncio.Event()

            async def wait(*_: object, **__: object) -> SampledTokens:
                waiting.set()
                return await asyncio.Future()

            engine.generate = wait  # type: ignore[method-assign]
        async with sampler.sessions:
            sampling = asyncio.create_task(sampler.sample(place.group(environment, 3, SAMPLING), 2))
            if how == "it is cancelled":
                await waiting.wait()
                assert [live.request for live in sampler.live] == ["g000007/2#0.0"]
                sampling.cancel()
            await asyncio.wait({sampling}, timeout=LIMIT_S)
    assert sampling.cancelled() or isinstance(sampling.result(), TrajectoryDropped)
    assert sampler.live == []


async def test_a_redelivered_task_gets_another_request_name(setting: Setting) -> None:
    both_in_flight = asyncio.Barrier(2)
    engine = MessageEngine([NextMessage([70, 71]), NextMessage([70, 71])])
    generate = engine.generate

    async def together(*arguments: object, **options: object) -> SampledTokens:
        await both_in_flight.wait()
        return await generate(*arguments, **options)  # type: ignore[arg-type]

    engine.generate = together  # type: ignore[method-assign]
    sampler = setting.sampler(engine)
    group = setting.group("lookup", 3, Sampling(1.0, 3, 1000, 1))
    async with asyncio.timeout(LIMIT_S), sampler.sessions:
        await asyncio.gather(sampler.sample(group, 2), sampler.sample(group, 2))
    assert sorted(engine.requests) == ["g000007/2#0.0", "g000007/2#0.0+"]


async def test_a_failed_session_is_retried_from_the_start(dialogue: ChatRenderer) -> None:
    limited = Sampling(1.0, 8, 1000, 1)
    with gateway_of(dialogue, BROKEN, ScriptedWorld(BROKEN), ScriptedWorld(reply("go on"))) as setting:
        engine = setting.engine_of("a", "b")
        ended = await setting.sample(engine, environment="fake", sampling=limited)
    assert isinstance(ended, TrajectoryFinished)
    assert engine.requests == ["g000007/2#1.0", "g000007/2#2.0"]
    assert (ended.attempt, ended.reward, ended.success, ended.turns) == (2, 0.5, False, 1)
    assert ended.environment_version == "7"
    assert (
        unpack_int32(ended.tokens).tolist()[: len(engine.prompts[1])] == engine.prompts[1]
    )  # no tokens of the first attempt


@pytest.mark.parametrize("fails_at", ["create", "step", "finalize"])
async def test_an_unknown_reward_drops_the_trajectory(dialogue: ChatRenderer, fails_at: str) -> None:
    made = {
        "create": BROKEN,
        "step": ScriptedWorld(reply("go on"), BROKEN),
        "finalize": ScriptedWorld(reply("go on"), reply("go on"), final=BROKEN),
    }
    with gateway_of(dialogue, made[fails_at]) as setting:
        ended = await setting.sample(
            setting.engine_of("a", "b"), environment="fake", sampling=Sampling(1.0, 8, 1000, 2), attempts=1
        )
    assert isinstance(ended, TrajectoryDropped)
    assert (ended.reason, ended.trajectory) == (DropReason.ENVIRONMENT_FAILED, "g000007/2")
    assert "environment_raised: " in ended.detail
    assert "ValueError: no" in ended.detail


async def test_a_gateway_without_answers_drops_the_trajectory(
    dialogue: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0)
    monkeypatch.setattr(client, "PATIENCE_S", 0)
    setting = Setting(f"http://127.0.0.1:{free()}", dialogue)
    ended = await setting.sample(setting.engine_of())
    assert isinstance(ended, TrajectoryDropped)
    assert ended.reason is DropReason.ENVIRONMENT_FAILED
    assert ended.detail.startswith("unreachable: POST /v1/sessions")


SYSTEM = Message(role="system", content="no")


class SystemFirst(ScriptedWorld):
    """A host whose session begins with a system message."""

    async def reset(self, seed: int) -> tuple[Opening, str]:
        return Opening((SYSTEM, Message(role="user", content="?"))), ""


@pytest.mark.parametrize(
    ("world", "place"),
    [(SystemFirst(), "the first prompt"), (ScriptedWorld(Reply((SYSTEM,))), "the environment's answer")],
)
async def test_a_dialogue_that_the_template_refuses_drops_one_trajectory(world: ScriptedWorld, place: str) -> None:
    renderer = ChatRenderer(FAMILIES["gemma"].tokenizer(), options={})
    with gateway_of(renderer, world, ScriptedWorld(reply("go on"), reply("go on"))) as setting:
        limited = Sampling(1.0, 8, 1000, 2)
        ended = await setting.sample(setting.engine_of("a"), environment="fake", sampling=limited)
        assert isinstance(ended, TrajectoryDropped)
        assert ended.reason is DropReason.ENVIRONMENT_FAILED
        assert ended.detail.startswith(f"the chat template cannot render {place} (roles: system")
        assert "System role not supported" in ended.detail
        assert world.closed, "the session is deleted"
        other = await setting.sample(setting.engine_of("a", "b"), environment="fake", sampling=limited)
        assert isinstance(other, TrajectoryFinished)
